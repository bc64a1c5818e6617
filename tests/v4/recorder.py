"""A plugin of the servers that ``tests.v4.record`` starts: what the draft model was given, by slot, and what it made.

Named to SGLang by :func:`environment`; the recording is written to the file that it says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FILE = "V4_RECORDING"
_ENTRY = "[sglang.srt.plugins]\nv4_recorder = tests.v4.recorder:activate\n"
_MODEL = "sglang.srt.models.deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark"
_PROPOSER = "sglang.srt.speculative.dspark_components.dspark_draft.DraftBlockProposer"
#: Positions before an anchor that a block sees.
WINDOW = 128


@contextmanager
def environment(folder: Path, recording: Path) -> Iterator[dict[str, str]]:
    """Variables with which a server records; ``folder`` holds what names the plugin."""
    info = folder / "v4_recorder-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: v4-recorder\nVersion: 0\n")
    (info / "entry_points.txt").write_text(_ENTRY)
    path = os.pathsep.join([str(folder), *(entry or str(Path.cwd()) for entry in sys.path)])
    yield {"PYTHONPATH": path, _FILE: str(recording)}


def activate() -> None:
    """Register the hooks, in every process of the server."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    events: list[dict[str, Any]] = []

    def write(original: Callable[..., None], model: Any, **given: Any) -> None:
        kept = given["swa_loc"] >= 0
        states = given["main_hidden"][kept].clone()
        events.append({"context": states, "slots": given["swa_loc"][kept].clone()})
        original(model, **given)

    def run(original: Callable[..., Any], proposer: Any, **given: Any) -> Any:
        batch, runner = given["batch"], proposer.draft_model_runner
        table = batch.req_to_token_pool.req_to_token
        to_window = runner.token_to_kv_pool.full_to_swa_index_mapping
        lens = batch.seq_lens.tolist()
        rows = zip(batch.req_pool_indices.tolist(), lens, strict=True)
        slots = [to_window[table[row, max(0, n - WINDOW) : n].long()].clone() for row, n in rows]
        made = original(proposer, **given)
        states = proposer.draft_model.collapse_hc_head(made.raw_hidden)
        logits = proposer.draft_model.compute_base_logits(made.raw_hidden)[0]
        events.append(
            {
                "lens": lens,
                "slots": slots,
                "anchors": made.draft_block_ids[:, 0].clone(),
                "states": states.clone(),
                "logits": logits.clone(),
            }
        )
        torch.save(events, os.environ[_FILE])
        return made

    HookRegistry.register(f"{_MODEL}.write_target_hidden_kv", write, HookType.AROUND)
    HookRegistry.register(f"{_PROPOSER}._run_forward", run, HookType.AROUND)
