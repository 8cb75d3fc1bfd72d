"""The kernels on the CPU: numba loops, and integer GEMMs by oneDNN."""
