"""Triton kernels of drafting and verification: one folder an op, torch and triton only.

Every folder holds ``reference.py`` (plain torch, float64-capable, readable as the paper),
``kernel.py`` (Triton, the mathematics at its top) and ``__init__.py`` (one typed public function with
``backend="auto" | "triton" | "torch"``). :mod:`dspark_kernels.support` is what they share. Configurations
compiled ahead of time, and their bytes, are in ``kernels/benchmarks/ops`` of a checkout.
"""
