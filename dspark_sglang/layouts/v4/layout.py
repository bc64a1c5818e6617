"""DeepSeek-V4 as one layout: a drafter in its target's checkpoint, under ``mtp.*``.

V4-Flash-DSpark and V4-Flash-0731 hold the same tensors; V4-Pro-0813 is taken where it holds those of V4-Pro-DSpark.
V4.1 is another layout and is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from dspark_sglang.checkpoint import (
    Shards,
    Tensor,
    read_config,
    read_header,
    read_shards,
    weight_files,
)
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import Config, DrafterConfig, Layout, compare, is_bundle
from dspark_sglang.layouts.v4.config import (
    ARCHITECTURE,
    V4Shape,
    has_drafter,
    release,
)
from dspark_sglang.layouts.v4.tensors import expected, plain_bundle, scale_of, usual, v4_tensors

_AGAIN = "Download the checkpoint again with `hf download`; it is incomplete."
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
#: What is missing, told from the name of a tensor that is.
_PARTS = (
    (".hc_", "hyper-connection"),
    ("hc_head", "hyper-connection"),
    (".indexer.", "indexer"),
    (".compressor.", "compressor"),
    ("mtp.", "drafter"),
    ("", "target"),
)
#: The width of heads that SGLang's code fixes, and how much larger published weights are unpacked.
_HEAD, _UNPACKED = 512, 4


class DeepSeekV4(Layout):
    """A drafter under ``mtp.*``."""

    name = "v4"
    bundled = True
    prefix = "mtp."
    reference = "dspark_sglang.layouts.v4.drafter:load"
    memory = "dspark_sglang.layouts.v4.memory"
    adapter = "dspark_sglang.serving.draft_model:V4DraftModel"

    def recognises(self, config: Config) -> bool:
        return is_bundle(config) or ARCHITECTURE in (config.get("architectures") or ())

    def read(self, config: Config) -> DrafterConfig:
        shape = V4Shape.from_config(config)
        return DrafterConfig(
            gamma=shape.gamma,
            markov_rank=shape.rank,
            markov_head="vanilla",
            mask_token_id=shape.mask_token,
            target_layer_ids=shape.target_layers,
            confidence_with_markov=shape.confidence_with_markov,
            hidden_size=shape.hidden,
            vocab_size=shape.vocab,
            num_layers=shape.layers,
            num_target_layers=shape.target_depth,
            num_heads=shape.heads,
            num_kv_heads=1,
            head_dim=shape.head_dim,
            intermediate_size=shape.expert_width,
            experts=shape.experts,
            bundled=True,
            sample_from_anchor=shape.sample_from_anchor,
        )

    def check(self, directory: Path, config: Config) -> None:
        check_bundle(directory)

    def check_stored(self, stored: Mapping[str, Tensor], config: Config, where: str) -> None:
        _compare(stored, v4_tensors(V4Shape.from_config(config)), config, where)

    def obstacle(self, target: Config) -> str | None:
        width = target.get("head_dim")
        if width == _HEAD:
            return None
        return f"its heads are {width} wide, and SGLang's {ARCHITECTURE} has {_HEAD}"

    def unpacked(self, target: Config) -> int:
        return _UNPACKED if "expert_dtype" in target else 1

    def part(self, name: str) -> str:
        # mtp.N.<part>: heads and the projection of the context lie in the last and first stage.
        rest = name.split(".", 2)[-1]
        own = ("markov_head.", "confidence_head.", "main_", "norm.", "hc_head_")
        return rest if rest.startswith(own) else "layers." + rest

    def digest(self, directory: Path, names: Mapping[str, str]) -> str:
        """Over names, types and shapes of all ``mtp.*`` tensors and the values of those that are not routed experts'."""
        found: dict[str, tuple[Path, int, Tensor]] = {}
        for path in weight_files(directory):
            header = read_header(path)
            own = self.own(header.tensors)
            found |= {name: (path, header.start, header.tensors[name]) for name in own}
        digest = hashlib.sha256()
        for name, (path, start, tensor) in sorted(found.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if ".experts." in name:
                continue
            with path.open("rb") as stream:
                stream.seek(start + tensor.data_offsets[0])
                digest.update(stream.read(tensor.nbytes))
        return digest.hexdigest()


V4 = DeepSeekV4()


def check_bundle(directory: Path) -> bool:
    """Check a bundle before any weight is read: configuration, index and headers say it all.

    Returns:
        Whether weights are stored as published, in fp8 and fp4.

    Raises:
        CheckpointError: no V4, a V4.1, no drafter or half of one, a drafter of another target, files or
            tensors that are missing, left over, of another shape or type, or an unknown compress ratio.
    """
    config = read_config(directory, role="target")
    named = release(config)
    if not has_drafter(config):
        raise CheckpointError(
            f"{directory} is a {named} whose config.json has no dspark_* keys.",
            expected="a checkpoint with its DSpark drafter inside",
            fix="Use the -DSpark checkpoint of this model, or a later release (V4-Flash-0731).",
        )
    drafter = V4Shape.from_config(config)
    if drafter.gamma > drafter.window:
        raise CheckpointError(
            f"config.json says dspark_block_size {drafter.gamma}.",
            expected=f"at most the window, {drafter.window}",
            fix="Use the config.json of the same checkpoint; published drafters have 5.",
        )
    shards = read_shards(directory)
    _check_total(shards)
    _check_drafter(V4.own(shards.tensors), shards)
    return _compare(shards.headers, plain_bundle(config), config, "The checkpoint")


def _check_total(shards: Shards) -> None:
    total = sum(_BYTES.get(t.dtype, 1) * math.prod(t.shape) for t in shards.headers.values())
    # Left out, or 0, by some; and how the published ones count is not known to the byte.
    if shards.total and abs(shards.total - total) > 0.01 * total:
        raise CheckpointError(
            f"The index in {shards.directory} says {shards.total} bytes; its files hold {total}.",
            expected="the sum of all tensors",
            fix="They belong to different revisions: download both again.",
        )


def _check_drafter(own: set[str], shards: Shards) -> None:
    """What is often in the place of a drafter is told by name."""
    if not own:
        raise CheckpointError(
            "The checkpoint holds half a bundle: config.json has dspark_* keys, and there is no mtp.* tensor.",
            expected="target and drafter in one checkpoint",
            fix=_AGAIN,
        )
    if "mtp.0.e_proj.weight" in own:
        raise CheckpointError(
            "mtp.0 is a next-token layer (mtp.0.e_proj.weight), not a DSpark drafter.",
            expected="mtp.0.main_proj.weight and draft layers",
            fix="Use the weights of the -DSpark checkpoint, whose config.json this is.",
        )
    engram = next((name for name in shards.tensors if ".engram." in name), None)
    if engram is not None:
        raise CheckpointError(
            f"The checkpoint has Engram tensors ({engram}).",
            expected="a DeepSeek-V4; Engram is V4.1's",
            fix="Serve it with SGLang's builtin (DSPARK_PLUGIN=off).",
        )


def _compare(
    stored: Mapping[str, Tensor], plain: Mapping[str, tuple[int, ...]], config: Config, where: str
) -> bool:
    """Compare names, types and shapes of all tensors; True where some are quantised."""
    named = {usual(name): header for name, header in stored.items()}
    wanted = expected(named, plain, config)
    for name, header in named.items():
        scale = scale_of(name)
        if scale in wanted and scale not in named and name in wanted:
            raise CheckpointError(
                f"{name} is {header.dtype} and has no {scale}.",
                expected="no quantised weight without a scale",
                fix=_AGAIN,
            )
    compare(named, wanted, where=where, about=_about)
    return any(tensor.dtype == "F8_E8M0" for tensor in wanted.values())


def _about(name: str, *, missing: bool) -> str:
    if missing:
        return f" ({next(what for part, what in _PARTS if part in name)})"
    if "markov_head" in name or "confidence_head" in name:
        return "The drafter's heads do not fit config.json (dspark_markov_rank, hidden_size, vocab_size): "
    return "The drafter belongs to another target: " if name.startswith("mtp.") else ""
