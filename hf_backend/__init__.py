"""Any causal language model that transformers knows, over Pagoda's pages: what `gpu_worker` falls back on.

A package of its own, because the worker itself does not depend on transformers (docs/adr/0008). The worker
loads it by name and calls `open_model`.
"""

from hf_backend.files import open_model

__all__ = ["open_model"]
