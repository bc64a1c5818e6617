"""What serving reads of SGLang's draft models, dense and DeepSeek-V4's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
from sglang.srt.models.dspark import DSparkDraftMixin

from dspark_sglang.errors import CompatibilityError
from dspark_sglang.layouts.v4.layout import V4
from dspark_sglang.serving.draft_model import V4DraftModel, draft_model


def head(name: str, **fields: Any) -> Any:
    return type(name, (), {"vocab_shard": None, **fields})()


def dense(**fields: Any) -> Any:
    class Dense(DSparkDraftMixin):
        markov_head = head("VanillaMarkov")
        confidence_head = object()
        fc = torch.nn.Linear(8, 5, bias=False)
        logits_mup_width_multiplier = 2.0

    made = Dense.__new__(Dense)
    vars(made).update(fields)
    return made


def v4(**fields: Any) -> Any:
    stage = SimpleNamespace(
        main_proj=torch.nn.Linear(8, 5, bias=False).to(torch.float8_e4m3fn), norm=lambda x: x + 1
    )
    given = {
        "markov_head": head("DSparkV4MarkovHead"),
        "confidence_head": object(),
        "stages": [stage],
        "collapse_hc_head": lambda x: x.sum(1),
        "_logits_from_x_post_hc": lambda x: x * 3,
    }
    return SimpleNamespace(**given | fields)


def test_dense() -> None:
    found = draft_model(dense())
    states = torch.ones(3, 5)
    assert found.width == 5 and found.dtype == torch.float32 and found.embeds_by_module
    assert found.states(states) is states and found.reads_target_head
    assert torch.equal(found.head_input(states), states / 2)


def test_another_embedding_stays_out_of_the_graph() -> None:
    model, embedding = dense(), torch.nn.Identity()
    assert hasattr(model, "forward_embed")
    found = draft_model(model)
    found.embed_with(embedding)
    # SGLang asks whether the model has it before it captures.
    assert not hasattr(model, "forward_embed") and model.embed_tokens is embedding
    assert isinstance(model, DSparkDraftMixin) and found.reads_target_head


def test_rows_that_nothing_reads_go_to_the_dummy_slot() -> None:
    written: dict[str, Any] = {}
    injector: Any = SimpleNamespace(inject_target_hidden=written.update)
    slots = torch.tensor([4, -1, 6])
    draft_model(dense()).write(injector, torch.ones(3, 8), slots, torch.arange(3))
    assert written["cache_loc"].tolist() == [4, 0, 6]


def test_v4() -> None:
    found = draft_model(v4())
    assert isinstance(found, V4DraftModel) and not found.embeds_by_module
    assert found.width == 5 and found.dtype == torch.bfloat16  # a quantised projection
    states = found.states(torch.ones(3, 4, 5))
    assert torch.equal(states, torch.full((3, 5), 4.0))
    assert torch.equal(found.head_input(states), states + 1)
    assert torch.equal(found.logits(states), states * 3)
    assert V4.own(["mtp.0.norm.weight", "layers.0.attn.wkv.weight"]) == {"mtp.0.norm.weight"}


@pytest.mark.parametrize(
    "model",
    [
        dense(markov_head=head("DSparkV4MarkovHead")),
        dense(confidence_head=None),
        v4(markov_head=head("VanillaMarkov")),
        v4(markov_head=head("DSparkV4MarkovHead", vocab_shard=(0, 8))),
        v4(confidence_head=None),
    ],
)
def test_heads_that_would_be_read_wrongly_are_refused(model: Any) -> None:
    with pytest.raises(CompatibilityError, match="DSPARK_PLUGIN=off"):
        draft_model(model)
