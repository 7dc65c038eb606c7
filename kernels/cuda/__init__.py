"""The operations in Triton, for CUDA devices; imported only where a tensor lies on one."""
