"""Where a drafter lives: the cost model, what is refused, what is counted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import collectives
from benchmarks.placement import COMPUTED
from dspark_sglang.checkpoint import read_config
from dspark_sglang.config import Settings
from dspark_sglang.core.placement import (
    CPU,
    H100,
    H800,
    Backbone,
    builtin_bytes,
    choose,
    exchanged_bytes,
    machine,
    seconds,
)
from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.dense.config import DenseConfig, parse_drafter_config
from dspark_sglang.serving import placement

ROOT = Path(__file__).resolve().parents[2]
#: The published drafter of Qwen3-8B: five layers of its width.
QWEN8 = Backbone(
    layers=5, hidden=4096, heads=32, kv_heads=8, head_dim=128, parameters=1_050_000_000, gamma=7
)


def smollm() -> DenseConfig:
    folder = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
    return parse_drafter_config(read_config(folder, role="drafter"))


def test_heads_that_do_not_divide_are_never_sharded() -> None:
    uneven = dataclasses.replace(QWEN8, heads=9, kv_heads=3)
    for ranks, divides in ((2, False), (3, True), (4, False), (8, False)):
        found = seconds(uneven, ranks, 8, H100)
        assert ("shard" in found) is divides is uneven.divides(ranks)
    assert QWEN8.divides(16), "ranks share a KV head evenly"
    assert not QWEN8.divides(12)


def test_faster_links_and_slower_memory_favour_shards() -> None:
    slow = dataclasses.replace(H100, memory=H100.memory / 20)
    assert choose(seconds(QWEN8, 8, 8, slow)) == "shard"
    far = dataclasses.replace(H100, latency=1e-3)
    assert choose(seconds(QWEN8, 8, 8, far)) == "replicate"
    tiny = dataclasses.replace(QWEN8, parameters=20_000_000)
    assert choose(seconds(tiny, 8, 8, H100)) == "replicate"
    assert seconds(QWEN8, 8, 64, H800)["shard"] > seconds(QWEN8, 8, 64, H100)["shard"]


def test_one_drafting_rank_is_never_faster_unless_ranks_share_a_machine() -> None:
    for requests in (1, 16, 64):
        found = seconds(QWEN8, 8, requests, H100)
        assert found["single"] > found["replicate"]
    assert choose(seconds(dataclasses.replace(QWEN8, heads=9, kv_heads=3), 2, 1, CPU)) == "single"


def test_costs_of_a_block_by_hand() -> None:
    sizes = Backbone(layers=2, hidden=10, heads=4, kv_heads=2, head_dim=5, parameters=1000, gamma=3)
    plain = dataclasses.replace(H100, memory=1e3, compute=1e30, link=1e3, latency=0.5)
    found = seconds(sizes, 2, 4, plain, context=10)
    kv = 4 * 10 * (2 * 2 * 2 * 5 * 2)
    anchors = 0.5 + 4 * 10 * 2 / 1e3
    assert found["replicate"] == pytest.approx((2000 + kv) / 1e3 + anchors)
    assert found["single"] == pytest.approx(found["replicate"] + 0.5 + 4 * 3 * 10 * 2 / 1e3)
    reduced = 0.5 + 240 / 1e3  # twice half the states
    assert found["shard"] == pytest.approx((1000 + kv / 2) / 1e3 + 4 * reduced + anchors)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", H100), ("NVIDIA H800", H800), ("cpu", CPU), ("another", H100)],
)
def test_machines_by_their_device(name: str, expected: object) -> None:
    assert machine(name) is expected


def test_bytes_of_a_round_at_eight_ranks() -> None:
    """At most 2 MB where the builtin moves 83 MB of base logits alone."""
    for sampled in (False, True):
        assert exchanged_bytes(**COMPUTED, sampled=sampled)["all"] <= 2_000_000
    builtin = builtin_bytes(**COMPUTED, vocabulary=129280)
    assert builtin["base_logits"] == 64 * 5 * 129536 * 2
    assert builtin["all"] > 80 * exchanged_bytes(**COMPUTED, sampled=True)["all"]


def test_a_placement_that_cannot_be_names_those_that_can() -> None:
    settings = Settings(placement="shard")
    with pytest.raises(ConfigError, match=r"9 query and 9 key heads.*2 ranks.*replicate, single"):
        placement.decide(settings, smollm(), ranks=2, requests=8, device="cpu")
    found = placement.decide(settings, smollm(), ranks=3, requests=8, device="cpu")
    assert found.placement == "shard"
    assert not found.whole


def test_auto_says_what_it_compared() -> None:
    found = placement.decide(Settings(), smollm(), ranks=2, requests=8, device="NVIDIA H100")
    assert found.placement == "replicate"
    assert set(found.microseconds) == {"replicate", "single"}
    alone = placement.decide(
        Settings(placement="single"), smollm(), ranks=1, requests=8, device="cpu"
    )
    assert alone.placement == "replicate"


def test_parameters_of_the_backbone_are_those_of_its_files() -> None:
    sizes = placement.backbone(smollm())
    config = smollm()
    width, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    layer = 2 * width * hidden + 2 * kv * hidden + 3 * config.intermediate_size * hidden
    layer += 2 * config.head_dim + 2 * hidden
    rest = len(config.target_layer_ids) * hidden * hidden + 2 * hidden
    assert sizes.parameters == config.num_layers * layer + rest


class Group:
    """A group coordinator whose collectives do nothing."""

    world_size = 4


def test_a_collective_is_counted_by_what_it_is_for(tmp_path: Path) -> None:
    import torch

    counts = collectives.Counts(tmp_path)
    counted = collectives._counted("all_gather", lambda self, input_, dim=-1: input_, counts)
    group, values = Group(), torch.zeros(3, 5)

    def propose() -> None:
        counted(group, values, dim=0)

    def _get_logits() -> None:
        counted(group, values)

    def _forward_prepared_verify(inner: object = None) -> None:
        counted(group, values)
        _get_logits()

    def _forward_decode() -> None:
        propose()
        _forward_prepared_verify()
        counted(group, values)

    propose()  # not in a decode step
    assert collectives.read(tmp_path) == {"count": {}, "bytes": {}}
    _forward_decode()
    each = 3 * 5 * 4 * 4
    found = collectives.read(tmp_path)
    names = {"drafting", "target", "target_logits", "deciding"}
    assert found == {"count": dict.fromkeys(names, 1), "bytes": dict.fromkeys(names, each)}


def test_collectives_are_wrapped_as_their_module_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_groups.py").write_text(
        "class GroupCoordinator:\n    world_size = 2\n"
        + "".join(f"    def {n}(self, x): return x\n" for n in collectives._FACTORS)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(collectives, "_MODULE", "made_up_groups")
    before = list(sys.meta_path)
    collectives.count_into(str(tmp_path))
    import made_up_groups  # type: ignore[import-not-found]

    assert sys.meta_path == before
    assert hasattr(made_up_groups.GroupCoordinator.all_reduce, "__wrapped__")


@pytest.mark.parametrize(
    ("code", "expected"),
    [(-9, "scheduler_1 (pid 12) was ended by signal 9."), (3, "(pid 12) ended with exit code 3.")],
)
def test_the_process_that_died_is_named(
    code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dspark_sglang.serving import faults

    processes = [SimpleNamespace(pid=11, exitcode=None), SimpleNamespace(pid=12, exitcode=code)]
    watchdog = SimpleNamespace(_names=["scheduler_0", "scheduler_1"], _processes=processes)
    manager = SimpleNamespace(_subprocess_watchdog=watchdog, gracefully_exit=False)
    handler = SimpleNamespace(tokenizer_manager=manager)
    ended = []
    faults.tell(lambda handler, signum: ended.append(signum), handler, 3)
    said = capsys.readouterr().err
    assert expected in said
    assert "scheduler_0" not in said
    assert ended == [3], "SGLang goes on to end the rest"
    manager.gracefully_exit = True
    assert faults.died(handler) == []


def test_ports_of_servers_are_not_those_that_ranks_are_given() -> None:
    import socket

    from dspark_sglang.server import _first_handed_out, free_ports

    found = free_ports(20)
    assert len(set(found)) == 20
    assert max(found) < _first_handed_out()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", found[0]))
        probe.listen()
        assert found[0] not in free_ports(20)


@pytest.mark.parametrize("heads", ["shard", "single", "auto", "replicate"])
def test_a_draft_vocabulary_needs_whole_heads(heads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank drafts from all of its tokens, so their rows of W1 and W2 stay."""
    from dspark_sglang.core.tensor_parallel import Shard
    from dspark_sglang.serving import tensor_parallel as seats

    vocabulary = SimpleNamespace(shard=Shard(0, 0, 6, 12))
    head = SimpleNamespace(tokens=torch.arange(4))
    monkeypatch.setattr(seats.Vocabulary, "of", lambda draft, ranks: vocabulary)
    monkeypatch.setattr(seats.DraftHead, "beside", lambda *given: head)
    markov = SimpleNamespace(
        markov_w1=torch.nn.Embedding(12, 3), markov_w2=torch.nn.Linear(3, 12, bias=False)
    )
    module = SimpleNamespace(embed_tokens=None, markov_head=markov, named_parameters=list)
    draft: Any = SimpleNamespace(module=module, width=5, embeds_by_module=True, LAYERS="layers.")
    ranks: Any = SimpleNamespace(count=2, rank=0)
    given: dict[str, Any] = {"mask": 0, "width": 3, "heads": heads}
    if heads in ("shard", "single"):
        with pytest.raises(ConfigError, match="has a draft vocabulary"):
            seats.shard_draft(draft, ranks, folder=Path("d"), **given)
    else:
        seats.shard_draft(draft, ranks, folder=Path("d"), **given).forget(None)
        assert len(markov.markov_w1.weight) == len(markov.markov_w2.weight) == 12
    # Without one a rank keeps its own rows of W2, and of W1 what its heads say.
    found = seats.shard_draft(draft, ranks, folder=None, **given)
    found.forget(None)
    assert len(markov.markov_w2.weight) == 6
    assert len(markov.markov_w1.weight) == (6 if heads == "shard" else 12)
    assert (found.held is None) == (heads in ("auto", "replicate"))
