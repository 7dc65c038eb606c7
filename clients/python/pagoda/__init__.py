"""Pagoda's Python SDK. `pagoda.v1` holds the generated messages and pulls in nothing but protobuf."""
