"""The dense layout as one object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dspark_sglang.checkpoint import Tensor
from dspark_sglang.layouts.base import Config, Layout, Obstacle
from dspark_sglang.layouts.dense import config as configs
from dspark_sglang.layouts.dense.config import DenseConfig
from dspark_sglang.layouts.dense.tensors import check_headers, check_tensors


class Dense(Layout):
    """A drafter in a directory of its own, in DeepSpec's format; and every target that has no layout of its own."""

    name = "dense"
    reference = "dspark_sglang.layouts.dense.reference:load"
    memory = "dspark_sglang.layouts.dense.memory"
    adapter = "dspark_sglang.serving.draft_model:DraftModel"

    def recognises(self, config: Config) -> bool:
        return True

    def read(self, config: Config) -> DenseConfig:
        return configs.parse_drafter_config(config)

    def kv_values(self, config: Config) -> int:
        own = self.read(config)
        return 2 * own.num_layers * own.num_kv_heads * own.head_dim

    def check(self, directory: Path, config: Config) -> None:
        check_tensors(directory, self.read(config))

    def check_stored(self, stored: Mapping[str, Tensor], config: Config, where: str) -> None:
        check_headers(stored, self.read(config), where=where, strict=True)

    def unserved(self, config: Config, target: Config | None = None) -> list[Obstacle]:
        return configs.unserved(config, target)


DENSE = Dense()
