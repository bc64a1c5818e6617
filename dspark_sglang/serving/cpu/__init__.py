"""An SGLang platform for machines without an accelerator.

It runs the unmodified SGLang server on plain PyTorch: no ``sgl_kernel``, no CUDA libraries.
It serves development, tests and small models; it is not meant to compete with GPUs.
"""

# SGLang discovers platforms while it is first imported: importing ours first would be circular.
import sglang  # noqa: F401
