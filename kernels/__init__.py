"""One operation a file, each with a plain torch reference beside its fast form."""
