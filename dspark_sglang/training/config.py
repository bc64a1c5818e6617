"""One typed file says everything about a training run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.dense.config import DrafterSpec


class DataSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is learned from."""

    #: Conversations, as `dspark data` writes them.
    files: tuple[str, ...]
    #: Per mille of the prompts kept for validation, chosen by their digest.
    validation_per_mille: int = 20
    #: Validation conversations that are scored, half greedy and half sampled where possible.
    validation_conversations: int = 48
    #: Longer conversations are cut, tokens.
    max_length: int = 512


class BatchSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much goes into one step, for each process."""

    #: Sequences of a step.
    sequences: int = 16
    #: Blocks trained in each sequence of a step.
    anchors: int = 64
    #: Micro-batches a step; ``sequences`` is the size of one.
    accumulate: int = 1


class LossSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's loss, and what comes before it.

    Soft-target KL at first, blended linearly into ``ce·CE + tv·‖p - q‖₁`` until ``blend`` of the
    steps are done; the confidence term counts throughout. Until ``full_from`` of the steps
    the laws are over the ``frequent_tokens`` tokens that are most frequent in the data.
    """

    #: Weight of cross-entropy.
    ce: float = 0.1
    #: Weight of the distance between both distributions.
    tv: float = 0.9
    #: Weight of the confidence term.
    confidence: float = 1.0
    #: Share of the steps until which soft-target KL fades out.
    blend: float = 0.6
    #: Tokens that distributions are over at first.
    frequent_tokens: int = 8192
    #: Share of the steps from which they are over all.
    full_from: float = 0.85
    #: Position ``k`` weighs ``exp(-(k - 1) / decay)``. 0: gamma.
    decay: float = 0.0


class OptimSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Optimiser and schedule: linear warm-up, constant, linear decay to zero."""

    #: Steps of the run.
    steps: int = 2000
    #: Highest rate.
    lr: float = 1e-3
    #: Steps until it is reached.
    warmup: int = 100
    #: Share of the steps spent decaying.
    decay: float = 0.25
    #: Muon for the matrices of ``fc`` and the layers; AdamW for the rest. False: AdamW for all.
    muon: bool = True
    #: As in AdamW; Muon takes the same.
    weight_decay: float = 0.0
    #: Largest norm of the gradient.
    clip: float = 1.0


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where target states are kept between epochs; what does not fit is computed again."""

    #: ``ram``, ``disk``, or ``none``.
    kind: Literal["none", "ram", "disk"] = "ram"
    #: Most that it takes, GiB.
    gib: float = 4.0
    #: Folder of a disk cache. Empty: inside the run's folder.
    folder: str = ""


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run."""

    #: Directory of the target.
    target: str
    #: Folder of the run.
    out: str
    data: DataSpec
    drafter: DrafterSpec = DrafterSpec()
    batch: BatchSpec = BatchSpec()
    loss: LossSpec = LossSpec()
    optim: OptimSpec = OptimSpec()
    cache: CacheSpec = CacheSpec()
    #: A drafter (DSpark or DFlash) whose weights are the start; widths must be its own. Empty: from
    #: the target.
    start: str = ""
    #: Start the layers from the target's last ones (without ``start``).
    from_target: bool = True
    #: Fit the Markov embeddings to neighbouring tokens of the text before training. Unset: unless
    #: ``start`` brings a Markov head.
    markov_from_text: bool | None = None
    #: Of anchors and of the order of sequences.
    seed: int = 0
    #: cpu or cuda.
    device: str = "cpu"
    #: Matrix products in bfloat16; weights and optimiser stay in float32.
    bf16: bool = True
    #: Steps between validations.
    validate_every: int = 250
    #: Steps between saved states.
    checkpoint_every: int = 100
    #: Stop after this many validations without a longer accepted length. 0: never.
    patience: int = 0


def read_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML or JSON file; ``overrides`` are ``optim.lr=0.001`` assignments.

    Raises:
        ConfigError: unreadable, an unknown field, or a value out of range.
    """
    import yaml

    fix = "See docs/reference/settings.md for every field, or `dspark train --example` for a file."
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            # The whole message takes several lines: it draws the one that is wrong.
            said = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ConfigError(
            f"{path} cannot be read: {said}.", expected="a YAML file", fix=fix
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no mapping.", expected="fields of a run", fix=fix)
    for assignment in overrides:
        _assign(raw, assignment, fix)
    try:
        config = msgspec.convert(raw, TrainConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}.", expected="a training config", fix=fix) from error
    check(config, fix)
    return config


def _loader() -> Any:
    """YAML 1.2 floats: PyYAML alone reads 1e-3 as text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    pattern = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    return Loader


def _assign(raw: dict[str, Any], assignment: str, fix: str) -> None:
    import yaml

    name, equals, value = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}.", expected="FIELD=VALUE", fix=fix)
    *sections, field = name.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment}.", expected="a known field", fix=fix)
    try:
        place[field] = yaml.load(value, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {assignment}: {error}.", expected="a YAML value", fix=fix
        ) from error


def check(config: TrainConfig, fix: str = "Correct the config file.") -> None:
    """Ranges that types do not say.

    Raises:
        ConfigError: naming the field.
    """
    drafter, batch, optim, loss = config.drafter, config.batch, config.optim, config.loss
    problems = {
        "drafter.gamma (1 to 16)": not 1 <= drafter.gamma <= 16,
        "drafter.layers (at least 1)": drafter.layers < 1,
        "drafter.kv_heads (at least 0)": drafter.kv_heads < 0,
        "drafter.markov_rank (at least 1)": drafter.markov_rank < 1,
        "drafter with markov_head none (sample_from_anchor false, layout qwen3)": (
            drafter.markov_head == "none"
            and (drafter.sample_from_anchor is True or drafter.layout != "qwen3")
        ),
        "drafter.draft_vocabulary (at least 0)": (drafter.draft_vocabulary or 0) < 0,
        "data.files (at least one)": not config.data.files,
        "data.validation_per_mille (1 to 500)": not 1 <= config.data.validation_per_mille <= 500,
        "data.validation_conversations (at least 2)": config.data.validation_conversations < 2,
        "data.max_length (at least 16)": config.data.max_length < 16,
        "batch (at least 1 each)": min(batch.sequences, batch.anchors, batch.accumulate) < 1,
        "optim.steps (at least 1)": optim.steps < 1,
        "optim.lr (above 0)": optim.lr <= 0,
        "optim.clip (above 0)": optim.clip <= 0,
        "optim.weight_decay (at least 0)": optim.weight_decay < 0,
        "seed (at least 0)": config.seed < 0,
        "patience (at least 0)": config.patience < 0,
        "device (cpu or cuda)": not re.fullmatch(r"cpu|cuda(:\d+)?", config.device),
        "optim.decay (0 to 1)": not 0 <= optim.decay <= 1,
        "loss weights (at least 0)": min(loss.ce, loss.tv, loss.confidence, loss.decay) < 0,
        "loss.blend (0 to 1)": not 0 <= loss.blend <= 1,
        "loss.full_from (0 to 1)": not 0 <= loss.full_from <= 1,
        "cache.gib (at least 0)": config.cache.gib < 0,
        "validate_every and checkpoint_every (at least 1)": min(
            config.validate_every, config.checkpoint_every
        )
        < 1,
    }
    wrong = [name for name, bad in problems.items() if bad]
    if wrong:
        raise ConfigError(f"Out of range: {'; '.join(wrong)}.", expected="the ranges", fix=fix)
