"""What a checkpoint layout is: all that differs between families of drafters, behind one object.

:func:`layout_of` finds it. Torch and SGLang take seconds to import, and most callers need neither: what needs them is
named here by import string and imported when it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

from dspark_sglang.checkpoint import Tensor, read_config, read_json, weight_files
from dspark_sglang.errors import CheckpointError

Config = Mapping[str, Any]
Shape = tuple[int, ...]

#: The layouts, as ``module:object``; the first that recognises a configuration has it.
LAYOUTS = ("dspark_sglang.layouts.v4.layout:V4", "dspark_sglang.layouts.dense.layout:DENSE")
FLOATS = ("BF16", "F16", "F32", "F64")
MIXED = "Weights and config.json belong to different checkpoints or revisions: download both."
_PIECE = 4 << 20


class DrafterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every drafter's configuration says about drafting."""

    #: Drafted tokens a round.
    gamma: int
    markov_rank: int
    markov_head: str
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    confidence_head: bool = True
    confidence_with_markov: bool
    hidden_size: int
    vocab_size: int
    #: Draft layers.
    num_layers: int
    num_target_layers: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: Width of an MLP, or of one expert.
    intermediate_size: int
    #: Routed experts of a draft layer; None: its MLP is dense.
    experts: int | None = None
    #: Whether it lies in its target's checkpoint.
    bundled: bool = False
    sample_from_anchor: bool = True


class Stored(NamedTuple):
    """What a tensor is stored as: type as safetensors calls it, and shape."""

    dtype: str
    shape: Shape


class Obstacle(NamedTuple):
    """One reason why a drafter cannot be served, as an error says it."""

    found: str
    expected: str
    fix: str


class About(Protocol):
    """What a tensor belongs to: in brackets behind one that is missing, a sentence before one that is wrong."""

    def __call__(self, name: str, *, missing: bool) -> str: ...


class Layout(ABC):
    """One family of drafters: what its files say, hold and compute."""

    name: ClassVar[str]
    #: Whether drafters lie in their target's checkpoint, under ``prefix``.
    bundled: ClassVar[bool] = False
    prefix: ClassVar[str] = ""
    #: ``(directory, dtype, embedding) -> Drafter`` of :mod:`dspark_sglang.core.engine`, in plain torch; ``embedding``
    #: is the target's ``[V, d]``.
    reference: ClassVar[str]
    #: Module with ``describe_target`` and ``describe_drafter``, for :mod:`dspark_sglang.planning`.
    memory: ClassVar[str]
    #: What serving asks of SGLang's draft model.
    adapter: ClassVar[str]

    @abstractmethod
    def recognises(self, config: Config) -> bool:
        """Whether a ``config.json`` is that of a target or a drafter of this family."""

    @abstractmethod
    def read(self, config: Config) -> DrafterConfig:
        """What a drafter's ``config.json`` says.

        Raises:
            CheckpointError: a field is missing, of the wrong type or out of range.
        """

    @abstractmethod
    def check(self, directory: Path, config: Config) -> None:
        """Check the files of a drafter before any weight is read.

        Raises:
            CheckpointError: a tensor is missing or of another shape, or a file is damaged.
        """

    @abstractmethod
    def check_stored(self, stored: Mapping[str, Tensor], config: Config, where: str) -> None:
        """Check that these are a drafter's tensors and no others.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape, or of a type that nothing loads.
        """

    def unserved(self, config: Config, target: Config | None = None) -> list[Obstacle]:
        """Every reason why SGLang 0.5.23 or this plugin cannot serve a drafter for a target; empty where both can."""
        return []

    def check_served(self, config: Config, target: Config | None = None) -> None:
        """Check that a drafter of this kind can be served for a target at all.

        Raises:
            CheckpointError: it cannot; says every reason.
        """
        found = self.unserved(config, target)
        if found:
            raise CheckpointError(
                " ".join(one.found for one in found),
                expected="; ".join(one.expected for one in found),
                fix=" ".join(dict.fromkeys(one.fix for one in found)),
            )

    def fits(self, target: Config) -> bool:
        """Whether drafters of this layout can be bundled with a target."""
        return not self.bundled or self.recognises(target)

    def obstacle(self, target: Config) -> str | None:
        """Why the CPU platform cannot serve a target of this family; None where it can."""
        return None

    def unpacked(self, target: Config) -> int:
        """How many times larger than its files the CPU platform keeps a target."""
        return 1

    def own(self, names: Iterable[str]) -> set[str]:
        """Those tensors of a checkpoint that are the drafter's."""
        return {name for name in names if name.startswith(self.prefix)}

    def kv_values(self, config: Config) -> int | None:
        """Keys and values that a drafter caches a token of context; None: it keeps a window."""
        return None

    def part(self, name: str) -> str:
        """The name of a drafter's tensor as dense drafters have it, its layer left out."""
        return name.removeprefix("model.")

    def digest(self, directory: Path, names: Mapping[str, str]) -> str:
        """SHA-256 over weight files: ``names`` maps the name each had to the one it has."""
        found = hashlib.sha256()
        for original, here in sorted(names.items()):
            found.update(original.encode())
            with (directory / here).open("rb", buffering=0) as stream:
                while piece := stream.read(_PIECE):
                    found.update(piece)
        return found.hexdigest()


def resolve(name: str) -> Any:
    """Import ``module:object``."""
    module, _, item = name.partition(":")
    return getattr(importlib.import_module(module), item)


@functools.cache
def layouts() -> tuple[Layout, ...]:
    """Every layout."""
    return tuple(resolve(name) for name in LAYOUTS)


def layout_of(config: Config | Path) -> Layout:
    """The layout of a ``config.json``, or of the model directory that holds one.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if isinstance(config, Path):
        config = read_config(config, role="model")
    return next(layout for layout in layouts() if layout.recognises(config))


def text_config(target: Config) -> Config:
    """The language model's part of a ``config.json``, nested or not."""
    text = target.get("text_config")
    return text if isinstance(text, Mapping) else target


#: Keys of a ``config.json`` that say that a drafter lies in the same checkpoint.
BUNDLED_KEYS = (
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
)


def is_bundle(config: Config) -> bool:
    """Whether a checkpoint holds its own drafter."""
    return any(config.get(key) is not None for key in BUNDLED_KEYS)


def bundle_at(directory: Path) -> Path | None:
    """``directory`` where it is a model's and holds its own drafter; else None.

    Raises:
        CheckpointError: its ``config.json`` is damaged.
    """
    path = directory / "config.json"
    if path.is_file() and is_bundle(read_json(path, what="a model's config.json")):
        return directory
    return None


def drafter_at(target: Path) -> Path | None:
    """The drafter that SGLang finds in a target's directory: its folder ``dspark``, or the target itself."""
    nested = target / "dspark"
    return nested if (nested / "config.json").is_file() else bundle_at(target)


def weights_digest(directory: Path) -> str:
    """SHA-256 that is a drafter's identity in artifacts: over its weight files in name order.

    Of a bundle, whose files hold hundreds of gigabytes of target, see :class:`~dspark_sglang.layouts.v4.layout.V4`.

    Raises:
        CheckpointError: a damaged file of a bundle.
    """
    files = {path.name: path.name for path in weight_files(directory)}
    bundle = bundle_at(directory)
    return (layout_of(bundle) if bundle else layouts()[-1]).digest(directory, files)


class Opened(NamedTuple):
    """A drafter whose files were looked at."""

    layout: Layout
    raw: dict[str, Any]
    config: DrafterConfig


def open_drafter(directory: Path) -> Opened:
    """Read a drafter's configuration and check its files, before any weight is read.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    raw = read_config(directory, role="drafter")
    layout = layout_of(raw)
    config = layout.read(raw)
    layout.check(directory, raw)
    return Opened(layout, raw, config)


def check_drafter(drafter: Path, target: Config | None, *, name: str) -> DrafterConfig:
    """All that can be said of a drafter before weights are read.

    Args:
        drafter: its directory.
        target: the target's ``config.json``, where it is known.
        name: how to call the target in messages.

    Raises:
        CheckpointError: it is damaged or incomplete, does not fit the target, or SGLang cannot run it.
    """
    raw = read_config(drafter, role="drafter")
    layout_of(raw).check_served(
        raw, target
    )  # before its tensors, which another architecture has others of
    opened = open_drafter(drafter)
    if target is not None:
        check_fits(opened.config, target, name=name)
    return opened.config


def check_fits(config: DrafterConfig, target: Config, *, name: str = "target") -> None:
    """Check that a drafter was made for a target of this shape.

    Args:
        config: the drafter.
        target: the target's ``config.json`` (text configuration nested or not).
        name: how to call the target in messages.

    Raises:
        CheckpointError: hidden size, vocabulary, layer ids or mask token do not fit.
    """
    shape = text_config(target)
    fix = f"Use a drafter made for {name}, at the same revision."
    for ours, theirs, what in (
        (config.hidden_size, shape.get("hidden_size"), "hidden_size"),
        (config.vocab_size, shape.get("vocab_size"), "vocab_size"),
        (config.num_target_layers, shape.get("num_hidden_layers"), "num_target_layers"),
    ):
        if ours is not None and theirs is not None and int(ours) != int(theirs):
            raise CheckpointError(
                f"The drafter's {what} is {ours}.", expected=f"{theirs}, as in {name}", fix=fix
            )
    layers = shape.get("num_hidden_layers")
    if layers is not None:
        outside = [i for i in config.target_layer_ids if not -1 <= i < int(layers)]
        if outside:
            raise CheckpointError(
                f"The drafter reads target layers {outside}.",
                expected=f"layers -1 to {int(layers) - 1} of {name}",
                fix=fix,
            )
    vocab = shape.get("padded_vocab_size") or shape.get("vocab_size")
    if vocab is not None and not 0 <= config.mask_token_id < int(vocab):
        raise CheckpointError(
            f"The drafter's mask_token_id is {config.mask_token_id}.",
            expected=f"a token below {vocab}",
            fix=fix,
        )


def _nothing(name: str, *, missing: bool) -> str:
    """Nothing is said of a tensor."""
    return ""


def compare(
    stored: Mapping[str, Tensor | None],
    wanted: Mapping[str, Stored],
    *,
    where: object,
    leave: Iterable[str] | None = (),
    about: About = _nothing,
    fix: str = MIXED,
) -> None:
    """Compare stored tensors with those that a configuration implies, by their headers.

    Any plain float stands for another, any integer of 32 or 64 bits too, and an empty type for all.

    Args:
        stored: headers by name; None where only the name is known.
        wanted: what should be there.
        where: holds them, in messages.
        leave: names that may be there too; None: any.
        about: says what a tensor belongs to.
        fix: what to do about a tensor too many.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of another type.
    """
    missing = [name for name in wanted if name not in stored]
    if missing:
        first = missing[0]
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors: it has no tensor {first}{about(first, missing=True)}.",
            expected=f"{first} of shape {list(wanted[first].shape)}",
            fix="Download it again; it is incomplete or of another architecture.",
        )
    unknown = sorted(stored.keys() - wanted.keys() - set(leave)) if leave is not None else []
    if unknown:
        raise CheckpointError(
            f"{where} has {len(unknown)} tensors more that its config.json does not imply, the first {unknown[0]}.",
            expected=f"the {len(wanted)} tensors of config.json and no others",
            fix=fix,
        )
    for name, (dtype, shape) in wanted.items():
        header = stored[name]
        if header is None or (header.shape == shape and _alike(header.dtype, dtype)):
            continue
        raise CheckpointError(
            f"{about(name, missing=False)}{name} is {header.dtype} {list(header.shape)}.",
            expected=f"{dtype} {list(shape)} (from config.json)".lstrip(),
            fix=MIXED,
        )


def _alike(found: str, wanted: str) -> bool:
    return wanted in ("", found) or any({found, wanted} <= set(k) for k in (FLOATS, ("I32", "I64")))
