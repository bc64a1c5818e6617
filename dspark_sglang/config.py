"""Every environment variable of this package, typed, in one place.

SGLang's own flags are untouched. Ours start with ``DSPARK_``; one that is not listed in
:class:`Settings` is an error, so that a typo is never a silent default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import platformdirs

from dspark_sglang.errors import ConfigError

PREFIX = "DSPARK_"
#: Values of ``DSPARK_COST`` that are no path.
COST_AUTO, COST_ONLINE = "auto", "online"

Schedule = Literal["adaptive", "lagged", "all"]
Plugin = Literal["auto", "off"]
DraftVocab = Literal["auto", "whole"]
Verification = Literal["rejection", "block"]
Kernels = Literal["auto", "triton", "torch"]
Lookup = Literal["auto", "off"]
Placement = Literal["auto", "replicate", "shard", "single"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process. Each field is ``DSPARK_<FIELD>`` in the environment."""

    #: ``auto``: replace SGLang's DSPARK when it is asked for. ``off``: leave the builtin.
    plugin: Plugin = "auto"
    #: ``adaptive``: verify what pays, by the step times this server measures. ``lagged``: the same, but how
    #: much is decided from confidences two steps old, as it always is under overlap scheduling.
    #: ``all``: always verify the whole drafted block.
    schedule: Schedule = "adaptive"
    #: Step cost. ``auto``: measured at start-up, once for each pair of models and machine (kept in the
    #: cache directory). ``online``: from the steps served alone. A path: what ``dspark calibrate --cost`` wrote.
    cost: str = COST_AUTO
    #: STS calibration file. Empty: ``sts.json`` beside the drafter's weights, if present.
    sts: str = ""
    #: ``auto``: draft over the tokens of ``draft_vocab.json`` beside the drafter's weights, if there.
    #: ``whole``: over the target's whole vocabulary.
    draft_vocab: DraftVocab = "auto"
    #: ``auto``: greedy requests whose text repeats itself draft what followed before, where that is expected
    #: to be accepted longer (without overlap scheduling: the host has to know the text). ``off``: never.
    lookup: Lookup = "auto"
    #: ``rejection``: sampled tokens are accepted one by one. ``block``: a block together, which
    #: never keeps fewer (also chosen by SGLang's ``--speculative-use-block-verification``).
    verification: Verification = "rejection"
    #: ``auto``: our Triton kernels on CUDA, PyTorch elsewhere. ``torch``: PyTorch everywhere.
    #: ``triton``: the kernels or nothing (on a CPU in Triton's interpreter, for tests).
    kernels: Kernels = "auto"
    #: Where the draft backbone lives with ``--tp``. ``replicate``: whole on every rank. ``shard``: its heads
    #: divided over the ranks, as SGLang does. ``single``: on rank 0, which sends its states to the
    #: others. ``auto``: whichever of them a cost model finds fastest.
    placement: Placement = "auto"
    #: The same for the Markov head's W1 and the confidence head. ``replicate``: whole on every rank.
    #: ``shard``: a rank has the rows of its tokens and scores its share of the draft states' columns.
    #: ``single``: on rank 0. ``auto``: ``replicate``, which no collective waits for.
    heads: Placement = "auto"
    #: Seed of draft sampling and acceptance. Negative: SGLang's ``--random-seed``.
    seed: int = -1
    #: Torch threads of the CPU platform. 0: the cores this process may run on.
    cpu_threads: int = 0
    #: Overlap scheduling on the CPU platform, in the order of an accelerator: slower there, for tests.
    cpu_overlap: bool = False
    #: Run on an SGLang release other than the pinned one after the contract check passes.
    allow_other_sglang: bool = False
    #: Where downloaded and converted models are kept. Empty: the user's cache directory.
    cache_dir: str = ""

    @property
    def cache_path(self) -> Path:
        """Directory for downloaded and converted models."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        return Path(platformdirs.user_cache_dir("dspark-sglang"))


def _convert(name: str, raw: str, hint: object) -> object:
    choices = get_args(hint)
    try:
        if choices:
            if raw not in choices:
                raise ValueError
            return raw
        if hint is bool:
            return {"1": True, "true": True, "0": False, "false": False}[raw.lower()]
        if hint is int:
            return int(raw)
    except (ValueError, KeyError):
        wanted = " or ".join(choices) if choices else {bool: "0 or 1", int: "an integer"}[hint]  # type: ignore[index]
        raise ConfigError(
            f"{name} is {raw!r}.", expected=wanted, fix=f"Set {name} to one of these or unset it."
        ) from None
    return raw


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``environ`` (the process environment when None).

    Raises:
        ConfigError: an unknown ``DSPARK_*`` name or an unusable value.
    """
    source = os.environ if environ is None else environ
    hints = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    values: dict[str, object] = {}
    for name, raw in source.items():
        if not name.startswith(PREFIX):
            continue
        key = name.removeprefix(PREFIX).lower()
        if key not in hints:
            known = [PREFIX + field.upper() for field in hints]
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{name} is set but is not a setting.",
                expected="one of " + ", ".join(known),
                fix=f"Did you mean {close[0]}?" if close else f"Unset {name}.",
            )
        values[key] = _convert(name, raw, hints[key])
    settings = msgspec.convert(values, Settings)
    if settings.cpu_threads < 0:
        raise ConfigError(
            f"{PREFIX}CPU_THREADS is {settings.cpu_threads}.",
            expected="0 (all allowed cores) or a positive number",
            fix="Unset it.",
        )
    return settings


def read_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The server's API key, from ``API_KEY``, as the manifests set it; None without one."""
    source = os.environ if environ is None else environ
    return source.get("API_KEY") or None


def authorization(key: str | None) -> dict[str, str]:
    """Headers for a server with that key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def read_baseline_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key of the server a canary compares with: ``BASELINE_API_KEY``, or the same as ``API_KEY``."""
    source = os.environ if environ is None else environ
    return source.get("BASELINE_API_KEY") or read_api_key(environ)
