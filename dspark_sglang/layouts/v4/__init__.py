"""The drafter that DeepSeek-V4 checkpoints carry under ``mtp.*``, in plain torch."""

from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.shape import V4Shape
from dspark_sglang.layouts.v4.tensors import check_tensors, random_tensors, v4_tensors

__all__ = ["V4Drafter", "V4Shape", "check_tensors", "random_tensors", "v4_tensors"]
