"""The pure core (invariant 1): no I/O, no clock, no random numbers, no protos."""
