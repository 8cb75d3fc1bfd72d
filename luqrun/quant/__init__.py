"""The library: quantizers, kernels, and layers whose three GEMMs run on 4-bit codes."""
