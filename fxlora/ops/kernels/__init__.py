"""Triton kernels of the operators: imported only where there is a GPU, or Triton's interpreter."""
