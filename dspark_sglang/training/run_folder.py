"""A run's folder: the state it goes on from as if nothing had happened, and logs as CSV.

The state is one file, replaced all or nothing, so a kill at any moment leaves the previous state. What is random
in training is decided by (seed, step), so weights, optimiser and step are all there is to keep.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import DataError
from dspark_sglang.training.config import TrainConfig

STATE = "state.pt"
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


class Log:
    """A CSV file that grows a row a step and forgets the rows after a resumed step.

    Args:
        path: the file.
        columns: the first is ``step``.
        after: the step the run goes on from.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, after: int) -> None:
        self._path, self._columns = path, list(columns)
        rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as old:
                rows = list(csv.DictReader(old))
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, self._columns, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in rows:  # a kill may have cut the last one
            whole = None not in row.values() and row.get("step", "").isdigit()
            if whole and int(row["step"]) <= after:
                writer.writerow(row)
        write_bytes(path, stream.getvalue().encode())

    def add(self, *values: float) -> None:
        """Append one row, values in the order of the columns.

        Raises:
            DataError: the disk is full.
        """
        try:
            with self._path.open("a", newline="") as stream:
                csv.writer(stream).writerow(
                    f"{v:.6g}" if isinstance(v, float) else v for v in values
                )
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written: {error.strerror}.",
                expected="space for the log of the run",
                fix="Free some space and run the same command again.",
            ) from error
