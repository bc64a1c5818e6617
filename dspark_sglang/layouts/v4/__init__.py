"""DeepSeek-V4: what its checkpoints hold, and in plain torch what target and drafter compute."""

from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.shape import V4Shape
from dspark_sglang.layouts.v4.tensors import check_tensors, random_tensors, v4_tensors

__all__ = ["V4Drafter", "V4Shape", "check_tensors", "random_tensors", "v4_tensors"]
