"""Triton kernels and their launchers, one file per op family. Importing this package does not import triton."""
