"""What the kernels cost: bytes, launches and resources counted without a GPU, times with one."""
