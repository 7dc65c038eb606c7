"""Llama-shaped decoders, described by a config and filled from a folder or a GGUF file."""
