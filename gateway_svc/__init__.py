"""The text tier: HTTP and gRPC doors, tokenizer, chat templates, detokenising, stop strings."""
