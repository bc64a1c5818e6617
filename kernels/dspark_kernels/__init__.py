"""Home of the Triton kernels, one folder an op.

Drafting and verification run as PyTorch (:mod:`dspark_sglang.core`) until their op has a kernel here.
"""
