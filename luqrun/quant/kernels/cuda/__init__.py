"""The kernels on a GPU: Triton."""
