"""Load a package in SGLang on this machine and let it generate a few tokens."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from dspark_packaging.drafter import read_shards
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import EVAL_FILE
from dspark_packaging.records import EvalArtifact
from dspark_sglang.checkpoint import read_config
from dspark_sglang.errors import ServerError
from dspark_sglang.layouts.base import layout_of
from dspark_sglang.server import Server, free_port, serve_command

#: What a server process needs beside two copies of the weights (packed for the CPU) and its KV.
_WORKING_BYTES = 3 << 30
_CUDA_ONLY = ("DeepseekV3", "DeepseekV2")
_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "List the first ten prime numbers:",
    "Once upon a time",
)
_TOKENS = 24
#: Of the drafts that were accepted a round when it was measured, the share that these few tokens have to reach.
_SHARE = 0.25


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What the server did."""

    #: After the first prompt.
    text: str
    #: Rounds of drafting and verification for all prompts, and tokens they committed.
    rounds: int
    tokens: int


def check_accepted(loaded: Loaded, recorded: EvalArtifact) -> None:
    """Refuse a drafter whose drafts are accepted far less than when it was measured.

    A round commits one token without any draft, so what counts lies above one. A few texts say little about
    the mean; a drafter that drafts noise has nearly nothing there.

    Args:
        loaded: what the server did, greedily.
        recorded: ``eval.json``.

    Raises:
        PackageError: it is far below, with both figures.
    """
    row = min(recorded.accepted_length, key=lambda row: row.temperature)
    low = row.ci95[0] if row.ci95 else row.overall
    least = 1 + _SHARE * (low - 1)
    if loaded.tokens / loaded.rounds < least:
        raise PackageError(
            f"It committed {loaded.tokens} tokens in {loaded.rounds} rounds, "
            f"{loaded.tokens / loaded.rounds:.2f} a round.",
            expected=f"at least {least:.2f}, for {row.overall:.2f} in {EVAL_FILE}",
            fix="Its drafts are not those that were measured: compare weights, config.json and "
            "target with the originals, or measure it again with `dspark eval --record`.",
        )


def obstacle(target: Path, drafter: Path | None) -> str | None:
    """Why a package cannot be loaded here; None where it can be tried.

    Args:
        target: the target, or a bundle.
        drafter: a stand-alone drafter.
    """
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed"
    config = read_config(target, role="target")
    named = str((config.get("architectures") or ["?"])[0])
    if named.startswith(_CUDA_ONLY):
        return f"{named} needs CUDA: its attention has no CPU form in SGLang"
    own = layout_of(config)
    if why := own.obstacle(config):
        return why
    folders = [target, *((drafter,) if drafter else ())]
    stored = sum(read_shards(folder).nbytes for folder in folders)
    needed = 2 * own.unpacked(config) * stored + _WORKING_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        return f"{needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} are free"
    return None


def ask(url: str, prompt: str = _PROMPTS[0]) -> Mapping[str, Any]:
    """Greedy text of a running server, with what it says about it.

    Raises:
        ServerError: it does not answer.
    """
    parameters = {"temperature": 0, "max_new_tokens": _TOKENS, "ignore_eos": True}
    try:
        reply = httpx.post(
            f"{url}/generate",
            json={"text": prompt, "sampling_params": parameters},
            timeout=300.0,
        ).raise_for_status()
        answer: Mapping[str, Any] = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(
            f"The server did not answer: {error}.",
            expected="generated text",
            fix="Serve it by hand and read its log.",
        ) from error
    return answer


def smoke_load(target: Path, drafter: Path | None, *, dtype: str = "bfloat16") -> Loaded:
    """Start SGLang with the package, generate, stop.

    Args:
        target: the target, or a bundle that holds its drafter.
        drafter: a stand-alone drafter.
        dtype: of the weights in the server.

    Raises:
        ServerError: it did not start or answer.
        PackageError: it served without speculation, or no round ran.
    """
    port = free_port()
    command = serve_command(target, port, dtype=dtype, drafter=drafter)
    if drafter is None:
        command += ["--speculative-algorithm", "DSPARK"]
    with tempfile.TemporaryDirectory() as scratch:
        # Verified whole at every step, so that a round certainly runs; without copies from the text, which
        # are accepted whatever the drafter does.
        environment = {"DSPARK_SCHEDULE": "all", "DSPARK_COST": "online", "DSPARK_LOOKUP": "off"}
        with Server(
            command, port=port, log=Path(scratch) / "server.log", environment=environment
        ) as server:
            server.wait_ready()
            # What ran while the server started is no answer to a prompt.
            before = server.dspark() or {}
            answers = [ask(server.url, prompt) for prompt in _PROMPTS]
            after = server.dspark() or {}
    rounds, tokens = (
        int(after.get(name, 0)) - int(before.get(name, 0))
        for name in ("rounds", "committed_tokens")
    )
    if rounds <= 0:
        raise PackageError(
            "The server generated without DSPARK.",
            expected="drafting and verification to run",
            fix="Check the installation with `dspark doctor`.",
        )
    return Loaded(text=str(answers[0]["text"]), rounds=rounds, tokens=tokens)
