"""DSpark speculative decoding for SGLang.

Importing this package is cheap and changes nothing: SGLang loads
:mod:`dspark_sglang.serving.entry` through entry points, and that module decides
whether anything was asked for.
"""

__version__ = "0.1.0"
