"""In which of SGLang's modes the target verifies: blocks of different lengths (``compact``), or whole ones (``static``)."""

from __future__ import annotations

import msgspec

from dspark_sglang.errors import ConfigError

VARIABLE = "SGLANG_RAGGED_VERIFY_MODE"
RAGGED, WHOLE = "compact", "static"
#: Attention backends that verify blocks of different lengths in CUDA graphs, by SGLang's names.
RAGGED_BACKENDS = ("fa3", "fa4", "trtllm_mha", "dsv4")
ADVICE = "fa3 (Ampere to Hopper), fa4 or trtllm_mha (B200)"
#: The same of targets with latent attention (MLA), beside those.
RAGGED_LATENT = ("flashinfer", "trtllm_mla")


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What the mode of a server with GPUs depends on."""

    #: Attention backend that verifies, by SGLang's name; None: SGLang chooses one that is not known here.
    backend: str | None = None
    #: Whether the GPU is one (sm90, sm120) on which trtllm_mha runs another kernel, for blocks of one length.
    xqa: bool = False
    #: Whether the target's attention is latent (MLA).
    latent: bool = False
    #: Whether the target has recurrent layers.
    recurrent: bool = False
    lora: bool = False
    two_batch_overlap: bool = False
    #: Whether batches run with the next larger CUDA graph.
    padded: bool = True
    #: Ranks of attention context parallelism, and of data parallelism.
    attention_cp: int = 1
    attention_dp: int = 1
    #: ``--moe-a2a-backend``.
    moe_a2a: str = "none"
    #: Whether prefills of some ranks run beside rounds of others.
    coordinated: bool = False
    #: Whether the drafter lies in the target's checkpoint.
    bundled: bool = False


def why_whole(server: Server) -> list[str]:
    """Every reason why SGLang 0.5.23 can verify only whole blocks; empty where it can verify any."""
    ragged = RAGGED_BACKENDS + (RAGGED_LATENT if server.latent else ())
    data = server.attention_dp > 1
    reasons = {
        f"the attention backend {server.backend}": server.backend not in (None, *ragged)
        or (server.backend == "trtllm_mha" and server.xqa),
        "the target's recurrent layers": server.recurrent,
        "--enable-lora": server.lora,
        "--enable-two-batch-overlap": server.two_batch_overlap,
        "--disable-cuda-graph-padding": not server.padded,
        "context parallelism": server.attention_cp > 1,
        "attention data parallelism with a drafter of its own": data and not server.bundled,
        f"attention data parallelism with --moe-a2a-backend {server.moe_a2a}": data
        and server.moe_a2a != "none",
        "prefills coordinated over attention data parallelism": data and server.coordinated,
    }
    return [reason for reason, holds in reasons.items() if holds]


def choose(asked: str | None, whole: list[str]) -> str:
    """The mode of a server.

    Args:
        asked: what the operator has set; None: nothing.
        whole: of :func:`why_whole`.

    Raises:
        ConfigError: a mode that this plugin does not have, or ``compact`` where it cannot be.
    """
    if asked not in (None, RAGGED, WHOLE):
        raise ConfigError(
            f"{VARIABLE} is {asked!r}.",
            expected=f"{RAGGED}, {WHOLE} or unset",
            fix=f"Unset {VARIABLE}, or run SGLang's builtin with DSPARK_PLUGIN=off.",
        )
    if asked == RAGGED and whole:
        raise ConfigError(
            f"{VARIABLE} is {RAGGED}, and SGLang verifies only whole blocks with {' and '.join(whole)}.",
            expected=f"{WHOLE} or unset",
            fix=f"Unset {VARIABLE}, or leave these out and pass --attention-backend {ADVICE}.",
        )
    return asked or (WHOLE if whole else RAGGED)
