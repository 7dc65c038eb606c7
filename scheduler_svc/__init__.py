"""The tokens tier: queues, sequence groups, KV blocks and steps. No torch, no text."""
