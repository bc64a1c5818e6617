"""What a run wrote down: a CSV of steps, a CSV of validations, and plots of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import DataError

STEPS = "steps.csv"
VALIDATIONS = "validations.csv"
PLOT = "curves.png"


class Table:
    """A CSV file that grows a row at a time and forgets rows after a resumed step."""

    def __init__(self, path: Path, columns: Sequence[str], *, after: int) -> None:
        self._path, self._columns = path, list(columns)
        kept = [row for row in read(path) if int(row["step"]) <= after] if path.exists() else []
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, self._columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(kept)
        write_bytes(path, stream.getvalue().encode())

    def add(self, row: Mapping[str, object]) -> None:
        """Append one row.

        Raises:
            DataError: the disk is full.
        """
        try:
            with self._path.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written: {error.strerror}.",
                expected="space for the log of the run",
                fix="Free some space and run the same command again.",
            ) from error


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; a cut last row is dropped."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]


def plot(folder: Path) -> Path | None:
    """Draw the run's curves; None while there is nothing to draw."""
    steps = read(folder / STEPS) if (folder / STEPS).exists() else []
    checks = read(folder / VALIDATIONS) if (folder / VALIDATIONS).exists() else []
    if len(steps) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    at = [int(row["step"]) for row in steps]
    gamma = sum(name.startswith("acceptance_") for name in steps[0])
    for k in range(1, gamma + 1):
        values = _smooth([float(row[f"acceptance_{k}"]) for row in steps])
        left.plot(at, values, label=f"position {k}", linewidth=1.2)
    left.set(xlabel="step", ylabel="acceptance 1 − TV (training)", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    for name, label in (("greedy", "temperature 0"), ("sampled", "temperature 1")):
        points = [(int(row["step"]), float(row[name])) for row in checks if row[name] != "nan"]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    right.set(xlabel="step", ylabel="accepted length (validation, bonus included)")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / PLOT
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _smooth(values: list[float], window: int = 25) -> list[float]:
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i - window + 1) : i + 1])
    ]
