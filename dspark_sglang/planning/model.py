"""A target and its drafter as a plan sees them: tensors, pools and a few sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE
from dspark_sglang.checkpoint import read_config, read_json, text_config
from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts.dense.config import (
    DrafterConfig,
    check_fits,
    check_served,
    parse_drafter_config,
)
from dspark_sglang.planning import dense, headers, published, reading, v4
from dspark_sglang.planning.kv import COMPRESSED_PAGE, DEFAULT_PAGE, DraftKv, Kv
from dspark_sglang.planning.tensors import SIZES, Split, Tensor

Config = Mapping[str, Any]

V4 = "DeepseekV4ForCausalLM"
#: Targets whose memory is known here.
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", dense.GEMMA3, dense.GEMMA4, V4)
_PROVENANCE = "provenance.json"
_W2 = "markov_head.markov_w2.weight"


class Source(msgspec.Struct, frozen=True):
    """Where a model's configuration comes from."""

    #: What to write after a flag of SGLang's.
    name: str
    config: dict[str, Any]
    #: None for a published configuration.
    directory: Path | None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A target with its drafter (none for serving without speculation)."""

    architecture: str
    target: Source
    drafter: Source | None
    tensors: list[Tensor]
    draft_tensors: list[Tensor]
    #: What a DSpark drafter replaces in the checkpoint.
    mtp_tensors: list[Tensor]
    kv: Kv
    draft_kv: DraftKv
    #: Most tokens of a request.
    context: int
    #: Drafted tokens a round; 0 without a drafter.
    gamma: int
    #: Bytes of rotary tables on one rank.
    rope_bytes: int
    #: Heads of the target's attention and of the drafter's.
    heads: tuple[int, ...]
    bundled: bool = False

    @property
    def page_size(self) -> int:
        """Tokens a page of the pool has unless told otherwise."""
        return COMPRESSED_PAGE if self.architecture == V4 else DEFAULT_PAGE


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """What of the server's arguments decides about how weights are kept."""

    #: ``--dtype``; None: as in the checkpoint.
    dtype: str | None = None
    blackwell: bool = False
    marlin: bool = False
    #: Bytes of one value in the pools; None: as the weights.
    kv_element: int | None = None
    config_only: bool = False
    #: This plugin's CPU platform, which unpacks quantised weights of DeepSeek-V4.
    on_cpu: bool = False
    #: This plugin drafts: a rank keeps the rows of the Markov head's W2 that its LM head has.
    cuts_heads: bool = True


def find(value: str, *, role: str) -> Source:
    """A model directory, or the name of a published configuration.

    Raises:
        CheckpointError: neither.
    """
    path = Path(value).expanduser()
    known = published.find(value) if not path.is_dir() else None
    if known is not None:
        return Source(known.checkpoint, known.config, None)
    if not path.is_dir():
        raise CheckpointError(
            f"{role} {value} is no directory.",
            expected=f"a model directory, or one of {', '.join(published.names())}",
            fix="Check the path, or download config.json and the index first with `hf download`.",
        )
    return Source(str(path), read_config(path, role=role), path)


def load(target: str, drafter: str | None, loading: Loading) -> Model:
    """Read a target and its drafter.

    Args:
        target: directory or published name.
        drafter: the same; None: the one bundled in the target, if any.
        loading: how weights will be kept.

    Raises:
        CheckpointError: unknown architecture, missing or contradictory files, or a drafter of
            another target or revision.
    """
    source = find(target, role="target")
    architecture = reading.architecture(source.config)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"The target is a {architecture}.",
            expected=" or ".join(ARCHITECTURES),
            fix="Its memory cannot be planned; nothing is assumed to fit.",
        )
    if architecture == V4:
        model = _compressed(source, drafter, loading)
    else:
        model = _standalone(source, architecture, drafter, loading)
    if source.directory is not None and not loading.config_only:
        expected = [*model.tensors, *(model.draft_tensors if model.bundled else ())]
        if model.architecture == V4 and not model.bundled:
            expected += model.mtp_tensors
        headers.check(headers.read(source.directory), expected, where=source.directory)
    return _with_cut_head(model) if loading.cuts_heads else model


def _with_cut_head(model: Model) -> Model:
    """With the vocabulary of W2 shared as the LM head's is, unless a draft vocabulary reads any row of it."""
    if has_draft_vocabulary(model.drafter):
        return model
    draft = [
        msgspec.structs.replace(tensor, split=Split.ROWS)
        if tensor.name.endswith(_W2) else tensor
        for tensor in model.draft_tensors
    ]  # fmt: skip
    return msgspec.structs.replace(model, draft_tensors=draft)


def has_draft_vocabulary(drafter: Source | None) -> bool:
    """Whether a draft vocabulary lies beside the drafter's weights."""
    directory = None if drafter is None else drafter.directory
    return directory is not None and (directory / DRAFT_VOCAB_FILE).is_file()


def _compressed(source: Source, drafter: str | None, loading: Loading) -> Model:
    config = source.config
    bundled = config.get("dspark_block_size") is not None
    own = None
    if drafter is not None:
        own = find(drafter, role="drafter")
        _same_bundle(source, own)
    kernels = v4.Kernels(fp8_wo_a=loading.blackwell, expert_grain=64 if loading.marlin else 128)
    quantised = v4.is_quantised(config)

    def kept(tensors: list[Tensor]) -> list[Tensor]:
        if quantised and not loading.on_cpu:
            return tensors
        stored = "BF16" if quantised else reading.weight_type(config)
        named = reading.TYPES[loading.dtype] if loading.dtype else stored
        return v4.on_cpu(tensors, named, quantised=quantised)

    stages = v4.drafter_shape(config) if bundled else None
    context = reading.integer(config, "max_position_embeddings")
    return Model(
        architecture=V4,
        target=source,
        drafter=(own or source) if bundled else None,
        tensors=kept(v4.target(config, kernels)),
        draft_tensors=kept(v4.drafter(config, kernels)) if bundled else [],
        mtp_tensors=kept(v4.mtp_layer(config, kernels)),
        kv=v4.kv(config),
        draft_kv=DraftKv(compressed_stages=stages.layers if stages else 0),
        context=context,
        gamma=stages.gamma if stages else 0,
        rope_bytes=v4.rope_bytes(config, context),
        heads=(reading.integer(config, "num_attention_heads"),),
        bundled=bundled,
    )


def _same_bundle(target: Source, drafter: Source) -> None:
    """Refuse a drafter bundled in another checkpoint, or in another revision of this one."""
    ours = {key: value for key, value in target.config.items() if not key.startswith("_")}
    theirs = {key: value for key, value in drafter.config.items() if not key.startswith("_")}
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))  # fmt: skip
    if different:
        raise CheckpointError(
            f"Target {target.name} and drafter {drafter.name} differ in {', '.join(different[:4])}.",
            expected="the drafter bundled in the target's own checkpoint",
            fix="Leave --drafter out.",
        )
    _same_revision(revision(target.directory), revision(drafter.directory), target, drafter)


def _standalone(source: Source, architecture: str, drafter: str | None, loading: Loading) -> Model:
    config = text_config(source.config)
    stored = reading.weight_type({**source.config, **config})
    kept = reading.TYPES[loading.dtype] if loading.dtype else stored
    _unquantised(source.config)
    pool = dense.kv(config, architecture, loading.kv_element or SIZES[kept])
    tensors = dense.target(config, architecture, stored, kept)
    own = find(drafter, role="drafter") if drafter is not None else _nested(source)
    parsed = _drafter(own, source) if own is not None else None
    draft: list[Tensor] = []
    if own is not None and parsed is not None:
        stored = reading.weight_type(own.config)
        kept = reading.TYPES[loading.dtype] if loading.dtype else stored
        draft = dense.drafter(parsed, stored, kept)
        if own.directory is not None and not loading.config_only:
            headers.check(headers.read(own.directory, "model."), draft, where=own.directory)
    heads = dense.heads(config, architecture, 0)
    context = reading.integer(config, "max_position_embeddings")
    return Model(
        architecture=architecture,
        target=source,
        drafter=own,
        tensors=tensors,
        draft_tensors=draft,
        mtp_tensors=[],
        kv=pool,
        draft_kv=DraftKv(full=dense.draft_kv(parsed, kept) if parsed else None),
        context=context,
        gamma=parsed.gamma if parsed else 0,
        rope_bytes=context * heads.dim * 4,
        heads=(heads.query, *((parsed.num_heads,) if parsed else ())),
    )


def _nested(target: Source) -> Source | None:
    """The drafter that SGLang finds in the target's ``dspark`` folder."""
    if target.directory is None or not (target.directory / "dspark" / "config.json").is_file():
        return None
    return find(str(target.directory / "dspark"), role="drafter")


def _drafter(own: Source, target: Source) -> DrafterConfig:
    config = parse_drafter_config(own.config)
    check_served(config, target.config)
    check_fits(config, target.config, name=target.name)
    pinned = None
    if own.directory is not None and (own.directory / _PROVENANCE).is_file():
        said = read_json(own.directory / _PROVENANCE, what="a drafter's provenance").get("target")
        pinned = said.get("revision") if isinstance(said, dict) else None
    _same_revision(revision(target.directory), pinned, target, own)
    return config


def _unquantised(config: Config) -> None:
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise CheckpointError(
            f"The target is quantised ({method!r}).",
            expected="bfloat16, float16 or float32 weights for this architecture",
            fix="Its memory cannot be planned; nothing is assumed to fit.",
        )


def revision(directory: Path | None) -> str | None:
    """The commit a directory was downloaded at, where the Hub's client left it; else None."""
    if directory is None:
        return None
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.name
    marker = directory / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        return marker.read_text(encoding="utf-8").splitlines()[0].strip() or None
    except (OSError, IndexError):
        return None


def _same_revision(ours: str | None, theirs: str | None, target: Source, drafter: Source) -> None:
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"{target.name} is at revision {ours[:12]}, the drafter {drafter.name} belongs to "
            f"{theirs[:12]}.",
            expected="a drafter and its target of the same revision",
            fix=f"Download the target again with `hf download --revision {theirs}`.",
        )
