"""Where this plugin can only verify whole blocks."""

from __future__ import annotations

from sglang.srt.runtime_context import get_context, get_parallel, get_schedule


def whole_blocks(device: str) -> str | None:
    """Why every drafted token has to be verified here; None where a step may verify some.

    Args:
        device: SGLang's device of the target.
    """
    if not get_schedule().disable_overlap_schedule and get_parallel().attn_dp_enabled:
        return "with attention data parallelism and overlap scheduling ranks would have to agree on every step"
    backend = get_context().resolved_server_args_dict().get("attention_backend")
    if not device.startswith("cpu") and backend == "triton":
        return "SGLang's Triton attention reads blocks of one length only"
    return None
