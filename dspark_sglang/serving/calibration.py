"""What was measured before: STS temperatures and the step cost, at start and while a server runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from sglang.srt.runtime_context import get_spec

from dspark_sglang import __version__
from dspark_sglang.artifacts import (
    SCHEMA_VERSION,
    STS_FILE,
    CostArtifact,
    read_artifact,
    read_sts,
    write_json,
)
from dspark_sglang.config import COST_AUTO, COST_ONLINE, Settings
from dspark_sglang.core.schedule.correction import Blocks
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.core.schedule.scheduler import Scheduler
from dspark_sglang.core.sts import fit_sts
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import machine, provenance

logger = logging.getLogger(__name__)

#: Blocks of one kind from which a fit is made.
FEWEST = 256


class Calibration:
    """Where a server's temperatures come from."""

    def __init__(self, settings: Settings, *, gamma: int, drafter_sha256: str | None) -> None:
        """Args:
        gamma: drafted tokens a request.
        drafter_sha256: digest of the drafter's weights; None where they are not in a local directory.
        """
        self._settings = settings
        self._gamma = gamma
        self._drafter_sha256 = drafter_sha256

    def read(self) -> tuple[torch.Tensor, str]:
        """``[gamma]`` float32 temperatures of the STS file as it is now, and its path; or ones and ``"none"``.

        SGLang's own flag for the file goes before ours.

        Raises:
            ArtifactError: the file named, or the one beside the weights, is damaged or belongs to
                another drafter.
        """
        given = str(get_spec().speculative_dspark_confidence_sts_path or self._settings.sts)
        path = Path(given or Path(get_spec().speculative_draft_model_path) / STS_FILE)
        if not given and not path.is_file():
            return self.none()
        artifact = read_sts(path, gamma=self._gamma, drafter_sha256=self._drafter_sha256)
        return torch.tensor(artifact.temperatures), str(path)

    def none(self) -> tuple[torch.Tensor, str]:
        """What serves without calibration."""
        return torch.ones(self._gamma), "none"

    def fitted(self, blocks: Blocks) -> tuple[torch.Tensor, str]:
        """What serves with STS fitted to what was verified lately.

        Raises:
            ConfigError: too little was verified yet.
        """
        found = fit(blocks)
        return torch.tensor(found.temperatures), f"fitted in service to {found.blocks} blocks"


class Refit(NamedTuple):
    """Fitted temperatures."""

    temperatures: list[float]
    blocks: int
    #: Mean calibration error of survival over positions, on these blocks.
    before: float
    after: float


def fit(blocks: Blocks) -> Refit:
    """Fit one temperature a position to blocks that a server has verified.

    To sampled requests where there are enough: theirs is the acceptance STS is defined by.

    Raises:
        ConfigError: too few blocks were verified yet.
    """
    chosen = blocks.sampled if blocks.sampled.sum() >= FEWEST else np.ones_like(blocks.sampled)
    count = int(chosen.sum())
    if count < FEWEST:
        raise ConfigError(
            f"{count} blocks were verified since the last fit.",
            expected=f"at least {FEWEST}",
            fix="Wait for more requests.",
        )
    position = np.arange(blocks.logits.shape[1])
    lens, counts = blocks.lens[chosen], blocks.counts[chosen]
    found = fit_sts(
        blocks.logits[chosen],
        (position < counts[:, None]).astype(np.float64),
        verified=position < lens[:, None],
    )
    return Refit(
        temperatures=[round(float(t), 4) for t in found.temperatures],
        blocks=count,
        before=float(found.before.mean()),
        after=float(found.after.mean()),
    )


# --- the step cost --------------------------------------------------------------

#: Sources of the step cost besides files and the settings' own word: nothing is timed; it is being measured before the
#: server listens; it was measured, but could not be kept.
COST_OFF, COST_UNMEASURED, COST_UNKEPT = "off", "unmeasured", "measured, not kept"
_COST_FILE = "a cost file of this plugin"
_MEASURE_AGAIN = "Measure it again with `dspark calibrate --cost`, or unset DSPARK_COST."


def _missing(expected: str) -> ConfigError:
    """What to raise where a server has no cost file."""
    return ConfigError(
        "This server has no cost file.",
        expected=expected,
        fix="Start it that way, or use dspark_cost 0.",
    )


class KnownCost:
    """The step cost of one server: taken over at start where it was measured before, kept when it has been."""

    def __init__(
        self, settings: Settings, scheduler: Scheduler, wanted: dict[str, str], *, writes: bool
    ) -> None:
        """Args:
            wanted: the fingerprint of this server's steps.
            writes: whether this process writes files; one of several ranks does.

        Raises:
            ArtifactError: the file named by ``DSPARK_COST`` is damaged or of something else.
        """
        self._settings, self._scheduler, self._wanted = settings, scheduler, wanted
        self._writes = writes
        #: Where it is cached; None: nowhere.
        self.path: Path | None = None
        #: Where it comes from, in words of the settings or as a file.
        self.source = COST_ONLINE if scheduler.adaptive else COST_OFF
        #: Wall seconds that measuring it has taken.
        self.seconds: float | None = None
        if not scheduler.adaptive or settings.cost == COST_ONLINE:
            return
        if settings.cost != COST_AUTO:
            known = load_cost(Path(settings.cost), wanted, scheduler.cost)
            self.seconds, self.source = known.seconds, settings.cost
            return
        self.path = cost_path(settings, wanted)
        cached = load_cached_cost(self.path, wanted, scheduler.cost)
        if cached is None:
            scheduler.measurement.begin()
        self.seconds = None if cached is None else cached.seconds
        self.source = COST_UNMEASURED if cached is None else str(self.path)

    def read(self) -> Callable[[], None]:
        """What schedules by the cost file as it is now.

        Raises:
            ArtifactError: there is none, it is damaged, or it is of something else.
        """
        named = self._settings.cost not in (COST_AUTO, COST_ONLINE)
        path = Path(self._settings.cost) if named else self.path
        if path is None:
            raise _missing("DSPARK_COST=auto or a path")
        found = CostModel(gamma=self._scheduler.gamma)
        load_cost(path, self._wanted, found)
        return lambda: self._scheduler.cost.restore(found.state())

    def keep(self) -> Callable[[], None]:
        """What keeps the step cost as it is known now for the next start of such a server.

        It ends the measurement at start-up, whatever came of that.

        Raises:
            ConfigError: there is no place for it, or another start would refuse it; the latter not
                while measuring, whose end must not fail.
            ArtifactError: the disk is full or may not be written; not while measuring either.
        """
        path = self.path
        if path is None:
            raise _missing("DSPARK_COST=auto")
        if self._scheduler.measurement.running:
            return lambda: self._end_measurement(path)
        # Written here already: what cannot be written has to be refused, and applying may not fail.
        self._save(path)
        return lambda: setattr(self, "source", str(path))

    def _end_measurement(self, path: Path) -> None:
        self.seconds = self._scheduler.measurement.end(self._scheduler.cost) or self.seconds
        try:
            self._save(path)
        except ConfigError as error:
            logger.warning("%s It is learned while serving, and measured at the next start.", error)
            self.source = COST_ONLINE
        except ArtifactError as error:
            logger.warning("%s The cost is used, and measured again at the next start.", error)
            self.source = COST_UNKEPT
        else:
            self.source = str(path)

    def _save(self, path: Path) -> None:
        require_both_kinds(self._scheduler.cost)
        if self._writes:
            save_cost(path, self._wanted, self._scheduler.cost, seconds=self.seconds)


def device_name(device: torch.device, threads: int) -> str:
    """The device steps run on, as fingerprints name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine()}, {threads} threads"


def fingerprint(
    *, target: str, drafter_sha256: str, drafter: str, **others: object
) -> dict[str, str]:
    """What a step's cost depends on, as text.

    Args:
        target, drafter: directories or names; a local target is known by its configuration and
            the size of its weights.
        others: device, dtype, ranks, backend and the like.
    """
    known = {name: str(value) for name, value in others.items()}
    return {
        "plugin": __version__,
        "target": _target(Path(target)),
        "drafter": drafter_sha256 or drafter,
        **known,
    }


def _target(path: Path) -> str:
    config = path / "config.json"
    if not config.is_file():
        return str(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return f"{hashlib.sha256(config.read_bytes()).hexdigest()[:16]}-{size}"


def cost_path(settings: Settings, wanted: dict[str, str]) -> Path:
    """Where the cost of that fingerprint is cached."""
    key = hashlib.sha256(msgspec.json.encode(wanted, order="sorted")).hexdigest()[:16]
    return settings.cache_path / "cost" / f"{key}.json"


def load_cost(path: Path, wanted: dict[str, str], model: CostModel) -> CostArtifact:
    """Take over the cost in ``path``.

    Returns:
        What was read.

    Raises:
        ArtifactError: missing, damaged, edited into nonsense, or of another fingerprint.
    """
    found = read_artifact(path, CostArtifact, _COST_FILE, _MEASURE_AGAIN)
    names = sorted(found.fingerprint.keys() | wanted.keys())
    other = [name for name in names if found.fingerprint.get(name) != wanted.get(name)]
    if other:
        name = other[0]
        raise ArtifactError(
            f"{path} was measured with another {', '.join(other)} "
            f"({name}: {found.fingerprint.get(name)}).",
            expected=f"{name}: {wanted.get(name)}",
            fix=_MEASURE_AGAIN,
        )
    try:
        model.restore(found.model)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}", expected=_COST_FILE, fix=_MEASURE_AGAIN) from error
    return found


def load_cached_cost(path: Path, wanted: dict[str, str], model: CostModel) -> CostArtifact | None:
    """Take over a cached cost if there is a sound one; a bad one is as good as none."""
    if not path.is_file():
        return None
    try:
        return load_cost(path, wanted, model)
    except ArtifactError as error:
        logger.warning("%s It will be measured again.", error)
        return None


def require_both_kinds(model: CostModel) -> None:
    """Refuse to keep a cost that :func:`load_cost` would refuse.

    Raises:
        ConfigError: rounds or decode steps have not been seen.
    """
    if not model.comparable:
        raise ConfigError(
            f"The step cost cannot be kept: its {model.observations} steps are not of both kinds.",
            expected="rounds and plain steps, which scheduling compares",
            fix="Serve requests with dspark_speculation -1, then send dspark_cost 2.",
        )


def save_cost(
    path: Path, wanted: dict[str, str], model: CostModel, *, seconds: float | None = None
) -> None:
    """Write the cost, all or nothing.

    Args:
        seconds: that measuring it took, where it was measured at start-up.

    Raises:
        ConfigError: one that :func:`load_cost` would refuse.
        ArtifactError: it cannot be written.
    """
    require_both_kinds(model)
    artifact = CostArtifact(
        schema_version=SCHEMA_VERSION,
        fingerprint=wanted,
        model=model.state(),
        seconds=seconds,
        provenance=provenance(
            ["dspark", "calibrate", "--cost"], data=f"{model.observations} steps"
        ),
    )
    try:
        write_json(path, artifact)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror}.",
            expected="a writable directory with space",
            fix="Free some space, or point DSPARK_CACHE_DIR elsewhere.",
        ) from error
