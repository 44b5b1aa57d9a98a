"""Triton kernels for CUDA (and, untested, ROCm) devices. Nothing outside this package imports triton."""
