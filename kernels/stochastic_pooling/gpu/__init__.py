"""The Triton backend, for NVIDIA, AMD and Intel GPUs: `launch` has the four functions of
`reference.py`, `sliding` and `general` the kernels."""
