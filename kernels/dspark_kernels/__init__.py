"""Triton kernels of drafting and verification: one folder an op, torch and triton only.

Every folder holds ``reference.py`` (plain torch, float64-capable, readable as the paper),
``kernel.py`` (Triton, the mathematics at its top), ``__init__.py`` (one typed public function with
``backend="auto" | "triton" | "torch"``) and ``bench.py`` (the configurations compiled ahead of time
and their bytes). :mod:`dspark_kernels.support` is what they share.
"""
