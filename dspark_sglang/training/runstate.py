"""The state of a run on disk: enough to go on as if nothing had happened.

One file, replaced all or nothing, so a kill at any moment leaves the previous state. What is random
in training is decided by (seed, step), so weights, optimiser and step are all there is to keep.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from dspark_sglang.errors import DataError
from dspark_sglang.training.config import TrainConfig

STATE = "state.pt"
CONFIG = "config.json"
#: What may change between stretches of one run without making it another run.
_FREE = ("out", "validate_every", "checkpoint_every", "patience", "cache", "device", "loss")


def _comparable(config: TrainConfig) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(config)
    plain["optim"].pop("steps")
    plain["optim"].pop("decay")
    return {key: value for key, value in plain.items() if key not in _FREE}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the state file.

    Raises:
        DataError: the disk is full; the previous state is still there.
    """
    name = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{STATE}.")
        with os.fdopen(handle, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(folder / STATE)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise DataError(
            f"{folder / STATE} cannot be written: {error}.",
            expected="space for the state of the run",
            fix="Free some space and run the same command again; it goes on from the last state.",
        ) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def load_state(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The state to go on from; None if the run is new.

    Raises:
        DataError: damaged, or of a run with another configuration.
    """
    for left in folder.glob(f".{STATE}.*"):  # a kill while saving
        left.unlink()
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        kept = msgspec.json.decode(state["config"], type=TrainConfig)
    except (
        OSError,
        EOFError,
        RuntimeError,
        KeyError,
        ValueError,
        pickle.UnpicklingError,
        msgspec.DecodeError,
    ) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            expected="the state of a run",
            fix="Remove the folder to train anew, or restore a copy.",
        ) from error
    before, now = _comparable(kept), _comparable(config)
    changed = sorted(key for key in now if now[key] != before.get(key))
    if changed:
        raise DataError(
            f"{folder} holds a run with other {', '.join(changed)}.",
            expected="the same configuration (steps, decay, loss, cache and intervals may change)",
            fix="Give another out, or remove the folder to train anew.",
        )
    return state
