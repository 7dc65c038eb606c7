"""The page at /ui: a chat, and the KV cache as it is now."""
