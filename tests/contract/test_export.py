"""Drafters that training writes run in SGLang's own model classes, loaded by SGLang's own code.

In process, on CPU, in float32: SGLang's model, KV pool and weight loading, with this package's
attention backend below them. What stays untested here is what needs a worker: the captured graphs, and
the acceptance loop of the DFLASH worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt import models
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator
from sglang.srt.models import dflash, dspark
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config
from sglang.srt.speculative.dspark_components.dspark_draft import (
    select_draft_hidden_without_anchor,
)
from sglang.srt.utils.hf_transformers_utils import get_config
from transformers import LlamaConfig

from dspark_sglang.checkpoint import read_config
from dspark_sglang.layouts.dense.config import DrafterSpec, parse_drafter_config
from dspark_sglang.layouts.dense.layout import DENSE
from dspark_sglang.layouts.dense.read import read_drafter
from dspark_sglang.layouts.dense.reference import DenseDrafter
from dspark_sglang.layouts.dense.tensors import check_tensors
from dspark_sglang.layouts.dense.write import drafter_config, write_drafter
from dspark_sglang.serving.cpu.attention import CpuAttentionBackend
from dspark_sglang.serving.cpu.platform import _kv_pool_cls
from dspark_sglang.training.batches import Packed, visible
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.start import from_drafter

HIDDEN, VOCAB, LENGTH, ANCHORS = 32, 97, 12, (2, 7, 11)
TOKENIZER = SimpleNamespace(added_tokens_encoder={"<mask>": 3}, pad_token_id=0)
TARGET = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
)
SPECS = {
    "vanilla": DrafterSpec(gamma=5, markov_rank=4),
    "gated": DrafterSpec(gamma=1, markov_head="gated", markov_rank=4),
    "rnn": DrafterSpec(gamma=7, markov_head="rnn", markov_rank=4),
    "kv-heads": DrafterSpec(gamma=3, kv_heads=4, markov_rank=4),
    "from-masks": DrafterSpec(gamma=4, sample_from_anchor=False, markov_rank=4),
    "dflash": DrafterSpec(gamma=4, markov_head="none"),
}


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's configuration of one CPU process, with a mode that has a confidence head."""
    monkeypatch.setenv("SGLANG_RAGGED_VERIFY_MODE", "compact")
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    override = get_context().override_server_args(device="cpu")
    override.install()
    try:
        with get_parallel().override(tp_rank=0, tp_group=group):
            yield
    finally:
        override.restore()


def written(folder: Path, spec: DrafterSpec) -> Drafter:
    """A random drafter, also on disk; its values are bfloat16's, so that both are equal."""
    raw = drafter_config(spec, TARGET, TOKENIZER)
    model = Drafter(parse_drafter_config(raw), markov=spec.markov_head != "none")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn_like(value)
            gain = value.ndim == 1 and "_head." not in name
            value.copy_((1 + 0.1 * noise if gain else 0.2 * noise).bfloat16())
    write_drafter(folder, raw, model.state_dict())
    return model


def builtin(folder: Path) -> Any:
    """What SGLang makes of a drafter's directory."""
    config = get_config(str(folder), trust_remote_code=False)
    classes = {cls.__name__: cls for cls in (*dspark.EntryClass, *dflash.EntryClass)}
    (architecture,) = config.architectures
    model = classes[architecture](config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)  # what is not loaded will be seen
    files = sorted(str(path) for path in folder.glob("*.safetensors"))
    model.load_weights(safetensors_weights_iterator(files))
    return model.eval()


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_is_loaded(name: str, tmp_path: Path) -> None:
    ours = dict(written(tmp_path, SPECS[name]).state_dict())
    if name == "dflash":
        ours = {key: value for key, value in ours.items() if "_head." not in key}
    theirs = dict(builtin(tmp_path).named_parameters())
    for layer in range(SPECS[name].layers):
        for joined, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            prefix = f"layers.{layer}.{joined.split('.')[0]}"
            stacked = [ours.pop(f"{prefix}.{part}_proj.weight") for part in parts]
            ours[f"layers.{layer}.{joined}_proj.weight"] = torch.cat(stacked)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key].float(), value, rtol=0, atol=0)


class Requests:
    """One request for each anchor: its context in the pool, its block in a batch."""

    def __init__(self, rows: int, config: Any) -> None:
        self.rows, count = rows, len(ANCHORS)
        width = LENGTH + rows
        self.token_to_kv_pool = _kv_pool_cls()(
            size=count * width + 1,
            page_size=1,
            dtype=torch.float32,
            head_num=config.num_key_value_heads,
            head_dim=config.head_dim,
            layer_num=config.num_hidden_layers,
            device="cpu",
            enable_memory_saver=False,
        )
        slots = torch.randperm(count * width) + 1
        self.req_to_token_pool = SimpleNamespace(req_to_token=slots.view(count, width).int())

    def slots(self, request: int, begin: int, end: int) -> torch.Tensor:
        return self.req_to_token_pool.req_to_token[request, begin:end].long()

    def batch(self) -> Any:
        anchors = torch.tensor(ANCHORS)
        own = [self.slots(i, a, a + self.rows) for i, a in enumerate(ANCHORS)]
        return SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            req_pool_indices=torch.arange(len(ANCHORS)),
            seq_lens=anchors,
            input_ids=torch.zeros(len(ANCHORS) * self.rows, dtype=torch.int64),
            out_cache_loc=torch.cat(own),
            out_cache_loc_is_physical=True,
            spec_info=SimpleNamespace(),
            global_num_token_non_padded_cpu=None,
            mha_return_lse=False,
        )


def write_context(model: Any, states: torch.Tensor, requests: Requests) -> None:
    """Put each request's context into the pool, as the DSPARK and DFLASH workers do."""
    for request, anchor in enumerate(ANCHORS):
        slots, positions = requests.slots(request, 0, anchor), torch.arange(anchor)
        pool = requests.token_to_kv_pool
        if isinstance(model, dspark.DSparkDraftMixin):
            model.write_target_hidden_kv(
                target_hidden=states[:anchor], pool=pool, positions=positions, cache_loc=slots
            )
            continue
        context = model.project_target_hidden(states[:anchor])
        for layer in model.layers:
            attention = layer.self_attn
            k, v = attention.kv_proj_only(model.prepare_context_hidden_for_kv(layer, context))
            k = attention.apply_k_rope(positions, attention.apply_k_norm(k))
            shape = (-1, attention.num_kv_heads, attention.head_dim)
            pool.get_key_buffer(attention.attn.layer_id)[slots] = k.view(shape)
            pool.get_value_buffer(attention.attn.layer_id)[slots] = v.view(shape)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_sglang_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    ours = written(tmp_path, SPECS[name]).eval()
    theirs = builtin(tmp_path)
    rows, count, gamma = ours.rows, len(ANCHORS), SPECS[name].gamma
    states = torch.randn(LENGTH, theirs.num_context_features * HIDDEN)
    embedded, mask_row = torch.randn(count, HIDDEN), torch.randn(HIDDEN)

    requests = Requests(rows, theirs.config)
    write_context(theirs, states, requests)
    block = mask_row.expand(count, rows, -1).clone()
    block[:, 0] = embedded
    batch = requests.batch()
    backend = CpuAttentionBackend(requests)
    backend.init_forward_metadata(batch)
    positions = (torch.tensor(ANCHORS)[:, None] + torch.arange(rows)).view(-1)
    with forward_context(ForwardContext(attn_backend=backend)):
        out = theirs(batch.input_ids, positions, batch, input_embeds=block.view(-1, HIDDEN))
    found = out.hidden_states
    if rows > gamma:  # as both workers choose the rows that are read
        found, _ = select_draft_hidden_without_anchor(found, bs=count, gamma=gamma)

    anchors = torch.tensor([ANCHORS])
    packed = Packed(torch.zeros(1, LENGTH), anchors, *[torch.empty(0)] * 4, source=(0,))
    wanted = ours(
        states[None],
        anchors,
        embedded[None],
        mask_row,
        visible(packed.anchors, packed.tokens.shape[1], rows),
    )
    torch.testing.assert_close(found.view(count, gamma, -1), wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "dflash"])
def test_sglang_reads_the_configuration_as_meant(name: str, tmp_path: Path) -> None:
    config = written(tmp_path, SPECS[name]).config
    raw = get_config(str(tmp_path), trust_remote_code=False)
    read = resolve_runtime_config(
        draft_hf_config=raw, speculative_num_draft_tokens=None, target_vocab_size=VOCAB
    )
    assert (read.gamma, read.mask_token_id) == (config.gamma, config.mask_token_id)
    layers = parse_dflash_draft_config(draft_hf_config=raw).resolve_target_layer_ids(
        target_num_layers=6
    )
    assert tuple(layers) == config.target_layer_ids
    model = builtin(tmp_path)
    assert model.gamma == config.gamma
    assert model.sample_from_anchor == config.sample_from_anchor
    assert model.confidence_head.with_markov == config.confidence_with_markov
    assert not any(layer.self_attn.use_gemma_norm for layer in model.layers)


def test_dflash_counts_rows(tmp_path: Path) -> None:
    """DFLASH takes block_size as rows, of which the first is the anchor."""
    config = written(tmp_path, SPECS["dflash"]).config
    raw = get_config(str(tmp_path), trust_remote_code=False)
    read = parse_dflash_draft_config(draft_hf_config=raw)
    assert read.block_size == config.gamma + 1
    assert read.mask_token_id == config.mask_token_id
    assert tuple(read.resolve_target_layer_ids(target_num_layers=6)) == config.target_layer_ids
    assert builtin(tmp_path).block_size == config.gamma + 1


@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn", "kv-heads"])
@torch.no_grad()
def test_our_loaders_take_the_same_files(name: str, tmp_path: Path) -> None:
    """Through the check before serving, the reference, and as a start of another training run."""
    model = written(tmp_path, SPECS[name])
    config, tensors = read_drafter(tmp_path)
    check_tensors(tmp_path, parse_drafter_config(read_config(tmp_path, role="drafter")))
    DENSE.check_served(read_config(tmp_path, role="drafter"))
    embedding = torch.randn(VOCAB, HIDDEN)
    reference = DenseDrafter(tensors, config, embedding)
    states = torch.randn(LENGTH, len(config.target_layer_ids) * HIDDEN)
    anchors = torch.tensor(ANCHORS)
    tokens = torch.randint(VOCAB, (len(ANCHORS),))
    found = reference.hidden(reference.context(states), anchors, embedding[tokens])
    packed = Packed(torch.zeros(1, LENGTH), anchors[None], *[torch.empty(0)] * 4, source=(0,))
    wanted = model(
        states[None],
        anchors[None],
        embedding[tokens][None],
        embedding[config.mask_token_id],
        visible(packed.anchors, packed.tokens.shape[1], config.gamma),
    )
    torch.testing.assert_close(found, wanted[0], rtol=1e-5, atol=1e-5)
    again = Drafter(config)
    assert from_drafter(again, tmp_path).new == []


def test_nested_heads_are_what_sglangs_class_does_not_find(tmp_path: Path) -> None:
    """Why every key is written at the top: the class builds its heads from there only."""
    written(tmp_path, SPECS["vanilla"])
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["dspark_config"] = {key: raw.pop(key) for key in ("markov_rank", "markov_head_type")}
    path.write_text(json.dumps(raw))
    assert parse_drafter_config(raw).markov_rank == 4
    with pytest.raises(ValueError, match="markov_rank > 0"):
        builtin(tmp_path)


def test_sglang_has_no_gemma_class() -> None:
    """When this fails, ``check_served`` can let Gemma 4 drafters through."""
    (folder,) = models.__path__
    assert not [
        path.name for path in Path(folder).glob("*.py") if "Gemma4DSpark" in path.read_text()
    ]
