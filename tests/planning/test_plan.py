"""``dspark plan``: input, verdicts, rules, output."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from dspark_sglang.cli import doctor
from dspark_sglang.cli.main import app
from dspark_sglang.errors import CheckpointError, ConfigError, DSparkError
from dspark_sglang.layouts.dense import memory as dense
from dspark_sglang.layouts.v4 import memory as v4
from dspark_sglang.planning import hardware, plan, report
from dspark_sglang.planning.hardware import Hardware
from dspark_sglang.planning.options import Options
from dspark_sglang.planning.rules import RULES
from tests.layouts.drafter_samples import FLAT, SHAPES, actionable, write
from tests.planning.plan_samples import (
    GEMMA4,
    LLAMA,
    SMALL_GPU,
    small_v4,
    v4_tensors,
    write_config,
    write_index,
    write_weights,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = Hardware(gpu="CPU", memory_mib=16384, runtime_mib=0, architecture="cpu", gpus=1, name="cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = write_config(tmp_path / "llama", LLAMA)
    write_index(folder, dense.target(LLAMA, "LlamaForCausalLM", "BF16", "BF16"))
    return folder


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write(tmp_path / "drafter", FLAT | {"torch_dtype": "float16"}, SHAPES)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    config = small_v4()
    folder = write_config(tmp_path / "v4", config)
    write_index(folder, v4_tensors(config))
    return folder


def make(target: Path | str, machine: Hardware = SMALL_GPU, **options: Any) -> plan.Plan:
    drafter = options.pop("drafter", None)
    only = options.pop("config_only", False)
    return plan.make(str(target), drafter and str(drafter), machine, Options(**options), config_only=only)  # fmt: skip


# --- machines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "nodes", "memory"),
    [
        ("h100-80x8", 8, 1, 81559),
        ("2xh100-80x8", 8, 2, 81559),
        ("h200x8", 8, 1, 143771),
        ("H800x4", 4, 1, 81559),
        ("h20x8", 8, 1, 97871),
        ("b200x8", 8, 1, 183359),
    ],
)
def test_profiles(name: str, gpus: int, nodes: int, memory: int) -> None:
    machine = hardware.read(name)
    assert (machine.gpus, machine.nodes, machine.memory_mib) == (gpus, nodes, memory)


@pytest.mark.parametrize(
    "name", ["h100", "h1000-80x8", "h100-80x0", "0xh100x8", "8", "h100-80x999"]
)
def test_a_machine_nobody_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        hardware.read(name)


def test_a_profile_can_be_edited(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(hardware.show(hardware.read("h100-80x8")).replace("81559", "40960"))
    assert hardware.read(str(path)).memory_mib == 40960


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("81559", "many"), ("81559", "-1"), ("81559", "12"), ("sm90", "sm42"), ("gpus: 8", "gpus: 0"),
        ("gpus: 8", "gpus: 8.5"), ("gpus: 8", "gpu_count: 8"), ("1536", "80000"), ("gpu: ", "gpu"),
    ],
)  # fmt: skip
def test_nonsense_in_a_hardware_file_is_named(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "mine.yaml"
    text = hardware.show(hardware.read("h100-80x8"))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match="mine"):
        hardware.read(str(path))


def test_this_machine_is_a_machine() -> None:
    machine = hardware.at_hand()
    assert machine.memory_mib > 1024 and machine.gpus >= 1


# --- what is read ----------------------------------------------------------------------------


def test_an_index_is_enough(llama: Path) -> None:
    made = make(llama, tp=1)
    assert made.fits and made.drafter is None
    assert "--speculative" not in made.command


def test_headers_are_read_where_weights_are_there(llama: Path) -> None:
    tensors = dense.target(LLAMA, "LlamaForCausalLM", "F16", "F16")
    (llama / "model.safetensors.index.json").unlink()
    write_weights(llama, tensors)
    assert make(llama, tp=1).fits
    write_weights(llama, [msgspec.structs.replace(tensors[0], shape=(16, 9)), *tensors[1:]])
    with pytest.raises(CheckpointError) as caught:
        make(llama, tp=1)
    actionable(caught.value, found="[16, 9]", expected="[16, 8]")


def test_a_missing_index_is_named(llama: Path) -> None:
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        make(llama, tp=1)
    actionable(caught.value, found="model.safetensors.index.json", expected="index")
    assert make(llama, tp=1, config_only=True).fits


def test_an_index_of_another_model_is_noticed(llama: Path) -> None:
    tensors = dense.target(LLAMA, "LlamaForCausalLM", "BF16", "BF16")
    write_index(llama, tensors[:-1])
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        make(llama)
    write_index(llama, [*tensors, msgspec.structs.replace(tensors[0], name="more")])
    with pytest.raises(CheckpointError, match=r"1 tensors more .* the first more"):
        make(llama)
    write_index(llama, tensors, total=12345)
    with pytest.raises(CheckpointError, match="The index in"):
        make(llama)
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        make(llama)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"torch_dtype": "int3"}, "dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_a_configuration_that_is_not_understood_never_fits(
    llama: Path, change: dict[str, Any], said: str
) -> None:
    write_config(llama, LLAMA | change)
    with pytest.raises(DSparkError, match=said):
        make(llama)


def test_no_such_model_names_the_published_ones() -> None:
    with pytest.raises(CheckpointError, match="deepseek-v4-pro-dspark"):
        make("no-such-model")


def test_a_drafter_is_planned_beside_its_target(llama: Path, drafter: Path) -> None:
    made = make(llama, drafter=drafter, tp=1)
    assert made.drafter_bytes is not None and made.drafter_bytes.mtp_layer == 0
    assert made.per_gpu_bytes["drafter weights"] == made.drafter_bytes.gross > 0
    assert made.per_gpu_bytes["draft KV"] > 0
    words = shlex.split(made.command)
    assert words[words.index("--speculative-draft-model-path") + 1] == str(drafter)


def test_a_drafter_of_another_target_is_refused(llama: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", FLAT | {"hidden_size": 9, "torch_dtype": "float16"}, SHAPES)
    with pytest.raises(CheckpointError, match="hidden_size is 9"):
        make(llama, drafter=other)


def test_a_drafter_of_another_revision_is_refused(llama: Path, drafter: Path) -> None:
    marker = llama / ".cache/huggingface/download"
    marker.mkdir(parents=True)
    (marker / "config.json.metadata").write_text("a" * 40 + "\netag\n0\n")
    (drafter / "provenance.json").write_text(json.dumps({"target": {"revision": "b" * 40}}))
    with pytest.raises(ConfigError) as caught:
        make(llama, drafter=drafter)
    actionable(caught.value, found="aaaaaaaaaaaa", expected="same revision")
    (drafter / "provenance.json").write_text(json.dumps({"target": {"revision": "a" * 40}}))
    assert make(llama, drafter=drafter, tp=1).fits


def test_a_bundle_is_its_own_drafter(bundle: Path, tmp_path: Path) -> None:
    made = make(bundle)
    assert made.drafter == str(bundle)
    assert made.drafter_bytes is not None
    assert made.drafter_bytes.net == made.drafter_bytes.gross - made.drafter_bytes.mtp_layer
    assert "--speculative-draft-model-path" not in made.command
    other = write_config(tmp_path / "other", small_v4() | {"dspark_markov_rank": 512})
    with pytest.raises(CheckpointError, match="differ in dspark_markov_rank"):
        make(bundle, drafter=other)


def test_two_revisions_of_one_bundle_do_not_mix(tmp_path: Path) -> None:
    folders = [tmp_path / "snapshots" / (name * 40) for name in "ab"]
    for folder in folders:
        write_config(folder, small_v4())
        write_index(folder, v4_tensors(small_v4()))
    with pytest.raises(ConfigError, match="belongs to bbbbbbbbbbbb"):
        make(folders[0], drafter=folders[1])


def test_a_last_layer_drafter_is_refused_as_when_serving(llama: Path, tmp_path: Path) -> None:
    last = write(tmp_path / "last", FLAT | {"target_layer_ids": [1, 4], "torch_dtype": "float16"}, SHAPES)  # fmt: skip
    with pytest.raises(CheckpointError, match="does not capture the last one"):
        make(llama, drafter=last)


# --- verdicts --------------------------------------------------------------------------------


def test_parts_add_up_to_the_device(llama: Path, drafter: Path, bundle: Path) -> None:
    for made in (make(llama, drafter=drafter, tp=1), make(bundle), make(bundle, tp=4)):
        assert made.fits
        assert sum(made.per_gpu_bytes.values()) == SMALL_GPU.memory_mib * 2**20
        weights = made.per_gpu_bytes["target weights"] + made.per_gpu_bytes["drafter weights"]
        assert weights == sum(made.weights_by_part.values())


def test_it_says_by_how_much_it_does_not_fit(bundle: Path) -> None:
    tight = msgspec.structs.replace(SMALL_GPU, memory_mib=8192, runtime_mib=512)
    made = make(bundle, tight, tp=1, context=4000, requests=1000)
    assert not made.fits and made.headroom < 0
    assert "are missing" in report.verdict(made)
    enough = msgspec.structs.replace(tight, memory_mib=8192 + -(-made.headroom // 2**20) + 40_000)
    assert make(bundle, enough, tp=1, context=4000, requests=1000).fits


def test_more_attention_groups_than_ranks_are_passed_over(bundle: Path) -> None:
    """Smaller numbers of ranks are tried for the smallest that fits; they cannot hold the groups."""
    made = make(bundle, attention_dp=4)
    assert made.tp == 8 and made.smallest_tp is not None and made.smallest_tp >= 4


def test_what_fits_has_its_tokens(bundle: Path, llama: Path) -> None:
    for folder, tp in ((bundle, 1), (bundle, 4), (llama, 1)):
        verdicts = set()
        for memory in range(4096, 16384, 1024):
            machine = msgspec.structs.replace(SMALL_GPU, memory_mib=memory)
            made = make(folder, machine, tp=tp, context=60, requests=40, max_running=40)
            verdicts.add(made.fits)
            assert made.fits == (made.tokens >= 40 * (60 + 1)), memory
        assert True in verdicts


def test_ranks_that_cannot_share_the_weights_are_passed_over(tmp_path: Path) -> None:
    config = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 1}
    folder = write_config(tmp_path / "even", config)
    assert make(folder, config_only=True).tp == 4  # 12 of width
    with pytest.raises(ConfigError, match="for 8 ranks"):
        make(folder, config_only=True, tp=8)


def test_more_memory_holds_more(bundle: Path) -> None:
    large = msgspec.structs.replace(SMALL_GPU, memory_mib=32768)
    small, big = make(bundle, tp=2), make(bundle, large, tp=2)
    assert small.tokens < big.tokens
    assert all(small.max_concurrency[c] <= n for c, n in big.max_concurrency.items())


def test_settings_are_tightened_only_where_nothing_else_fits(bundle: Path) -> None:
    made = make(bundle)
    assert "tighter" not in {finding.rule for finding in made.findings}
    machines = (
        msgspec.structs.replace(SMALL_GPU, memory_mib=size) for size in range(4096, 16384, 256)
    )
    tight, squeezed = next((m, p) for m in machines if (p := make(bundle, m, tp=1)).fits)
    assert "tighter" in {finding.rule for finding in squeezed.findings}
    words = shlex.split(squeezed.command)
    assert int(words[words.index("--max-running-requests") + 1]) < 48
    # What the user fixed stays.
    fixed = make(bundle, tight, tp=1, max_running=48)
    assert "--max-running-requests 48" in fixed.command and not fixed.fits


def test_a_capped_pool_that_is_too_small_does_not_fit(llama: Path) -> None:
    assert not make(llama, tp=1, max_total_tokens=8, context=32).fits
    assert make(llama, tp=1, max_total_tokens=40, context=32).fits


@pytest.mark.parametrize(
    "wrong",
    [{"tp": 0}, {"requests": 0}, {"mem_fraction": 1.5}, {"kv_cache_dtype": "fp4"}, {"moe_a2a": "fast"}, {"tp": 9},
     {"context": 100_000}],
)  # fmt: skip
def test_numbers_no_server_takes(llama: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(llama, **wrong)


def test_what_is_kept_free_is_sglangs_rule_of_thumb() -> None:
    """In MiB: 512, 1.5 a prompt token, 1024 for 8 ranks, 2 a request and 8 a prompt graph."""
    made = plan.make("deepseek-v4-flash-dspark", None, hardware.read("h100x8"))
    free = 512 + 8192 * 1.5 + 1024 + 48 * 2 + 58 * 8
    assert made.mem_fraction_static == round(1 - free / 81559, 3)
    assert made.per_gpu_bytes["graphs"] == (48 * 2 + 58 * 8) * 2**20
    # From 60 GiB on at least 10 GiB stay free.
    small = plan.make("deepseek-v4-flash-dspark", None, hardware.read("h100x8"), Options(chunked_prefill=512))  # fmt: skip
    assert small.mem_fraction_static == round(1 - 10240 / 81559, 3)


def test_rows_of_a_draft_vocabulary_are_counted(llama: Path, drafter: Path) -> None:
    (drafter / "draft_vocab.json").write_text(json.dumps({"tokens": [1, 2, 3]}))
    made = make(llama, drafter=drafter, tp=1)
    assert made.weights_by_part["drafter: draft vocabulary"] == 3 * 8 * 2


def test_the_cpu_keeps_projections_twice(llama: Path) -> None:
    made = make(llama, CPU)
    projections = 5 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 12 * 8) + 16 * 8
    assert made.weights_by_part["packed copies"] == 2 * projections
    assert made.per_gpu_bytes["graphs"] == 0
    wide = make(llama, CPU, dtype="float32")
    assert wide.weights_by_part["packed copies"] == 4 * projections


def test_a_rank_has_the_whole_of_both_tables(bundle: Path) -> None:
    """Drafting reads rows of candidates that other ranks have found."""
    config = small_v4()
    table = config["vocab_size"] * config["dspark_markov_rank"] * 2
    for options in ({"tp": 1}, {"tp": 4}, {"tp": 4, "builtin": True}, {"tp": 4, "attention_dp": 4}):
        assert make(bundle, **options).weights_by_part["drafter: markov_head"] == 2 * table
    # Every rank copies the LM head's rows of a draft vocabulary.
    (bundle / "draft_vocab.json").write_text(json.dumps({"tokens": [1, 2, 3]}))
    parts = make(bundle, tp=4).weights_by_part
    assert parts["drafter: markov_head"] == 2 * table
    assert parts["drafter: draft vocabulary"] == 3 * config["hidden_size"] * 2


def test_a_gpu_plan_of_a_bundle_says_that_it_was_never_run(bundle: Path) -> None:
    said = {finding.rule: finding.message for finding in make(bundle).findings}
    assert "never run on a GPU" in said["v4-plugin"] and "tiny bundle" in said["v4-plugin"]
    assert "v4-plugin" not in {finding.rule for finding in make(bundle, builtin=True).findings}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_cpu_platform_unpacks_a_bundle(bundle: Path, tmp_path: Path, dtype: str | None) -> None:
    """Published weights and plain ones of the same sizes take the same memory there."""
    plain = write_config(tmp_path / "plain", PLAIN_V4)
    write_index(plain, v4.on_cpu(v4_tensors(PLAIN_V4), "BF16", quantised=False))
    big = msgspec.structs.replace(CPU, memory_mib=131072)
    stored, unpacked = (make(folder, big, dtype=dtype) for folder in (bundle, plain))
    assert stored.fits and stored.weights_by_part == unpacked.weights_by_part
    values = sum(t.elements for t in v4.on_cpu(v4_tensors(small_v4()), "BF16", quantised=False)
                 if t.part == "experts" and not t.name.startswith("mtp."))  # fmt: skip
    assert stored.weights_by_part["experts"] == values * (4 if dtype else 2)
    assert stored.command and "DSPARK_PLUGIN" not in stored.command


# --- rules -----------------------------------------------------------------------------------

#: For every rule, a case it applies to: model, machine, options.
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dp-lm-head": ("v4", "small", {"attention_dp": 2, "tp": 2}),
    "dp-a2a": ("v4", "small", {"attention_dp": 2, "tp": 2, "moe_a2a": "deepep"}),
    "dp-divides": ("v4", "small", {"attention_dp": 3, "tp": 4}),
    "ep-divides": ("v4", "small", {"ep": 3, "tp": 4}),
    "a2a-ep": ("v4", "small", {"moe_a2a": "megamoe", "tp": 2}),
    "pd-plugin": ("llama", "small", {"pd": "decode", "tp": 1}),
    "eplb-needs-ep": ("v4", "small", {"eplb": True}),
    "eplb-copies": ("v4", "small", {"eplb": True, "ep": 2, "tp": 2}),
    "v4-page": ("v4", "small", {"page_size": 64}),
    "v4-backend": ("v4", "small", {"attention_backend": "fa3"}),
    "v4-groups": ("v4", "wide", {"tp": 16}),
    "v4-fp4-width": ("v4", "wide", {"tp": 32, "attention_dp": 4, "moe_runner": "flashinfer_mxfp4"}),
    "v4-marlin": ("v4", "wide", {"tp": 32, "attention_dp": 4}),
    "marlin-hopper": ("v4", "blackwell", {"moe_runner": "marlin"}),
    "shared-experts-whole": ("v4", "wide", {"tp": 32, "attention_dp": 4}),
    "v4-plain": ("v4plain", "small", {}),
    "v4-plugin": ("v4", "small", {}),
    "whole-blocks": ("llama", "small", {"attention_backend": "flashinfer", "tp": 1}),
    "capture": ("gemma3", "small", {"tp": 1}),
    "gemma4-backend": ("gemma4", "small", {"tp": 1}),
    "gemma4-cpu": ("gemma4", "cpu", {}),
    "hicache-radix": ("llama", "small", {"hicache": True, "radix_cache": False, "tp": 1}),
    "hicache-host": ("llama", "small", {"hicache": True, "tp": 1}),
    "running-default": ("llama", "small", {"tp": 1}),
    "running-default-v4": ("v4", "small", {}),
    "v4-draft-budget": ("v4", "small", {}),
    "draft-heads": ("llama", "small", {"tp": 4}),
    "heads": ("llama", "small", {"tp": 4}),
    "cpu-ranks": ("llama", "cpu2", {"tp": 2}),
}
MACHINES = {
    "small": SMALL_GPU,
    "wide": msgspec.structs.replace(SMALL_GPU, nodes=4),
    "blackwell": msgspec.structs.replace(SMALL_GPU, architecture="sm100"),
    "cpu": CPU,
    "cpu2": msgspec.structs.replace(CPU, gpus=2),
}
PLAIN_V4 = {
    **small_v4(),
    "expert_dtype": None,
    "quantization_config": None,
    "torch_dtype": "bfloat16",
}
CONFIGS = {"gemma3": GEMMA3, "v4plain": PLAIN_V4, "gemma4": GEMMA4 | {"num_hidden_layers": 5, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}}  # fmt: skip


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == {rule.id for rule in RULES}
    assert len(RULES) == len({rule.id for rule in RULES})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_applies_where_it_should(
    rule: Any, llama: Path, drafter: Path, bundle: Path, tmp_path: Path
) -> None:
    name, machine, options = CASES[rule.id]
    folder = {"v4": bundle, "llama": llama}.get(name)
    if folder is None:
        folder = write_config(tmp_path / name, CONFIGS[name])
    own = None if name in ("v4", "v4plain") else drafter
    made = make(folder, MACHINES[machine], drafter=own, config_only=True, **options)
    found = {finding.rule: finding for finding in made.findings}
    assert rule.id in found, sorted(found)
    assert found[rule.id].source
    if rule.verdict == "refused":
        assert not made.fits and made.refused and not made.command and not made.per_gpu_bytes


def test_nothing_is_refused_without_a_reason(llama: Path, drafter: Path) -> None:
    made = make(llama, drafter=drafter, tp=1)
    assert made.fits and [f.rule for f in made.findings if f.verdict != "note"] == []


def test_whole_blocks_where_sglang_has_no_others(bundle: Path, llama: Path, drafter: Path) -> None:
    def noted(made: plan.Plan) -> list[str]:
        assert made.fits and not made.refused
        return [finding.rule for finding in made.findings if finding.rule == "whole-blocks"]

    def dense(**options: Any) -> plan.Plan:
        return make(llama, drafter=drafter, tp=1, **options)

    assert noted(make(bundle, lora=True)) == noted(dense(lora=True)) == ["whole-blocks"]
    assert noted(make(bundle, lora=True, builtin=True)) == []
    assert noted(dense(attention_backend="fa3")) == noted(dense()) == []
    assert noted(dense(attention_backend="triton")) == ["whole-blocks"]
    assert noted(dense(attention_backend="trtllm_mha")) == [
        "whole-blocks"
    ]  # Hopper's is another kernel
    to_all = make(bundle, tp=2, attention_dp=2, moe_a2a="megamoe")
    assert noted(to_all) == ["whole-blocks"] and to_all.ep == 2
    one = make(bundle, tp=1).weights_by_part["shared_experts"]
    assert to_all.weights_by_part["shared_experts"] == one


def test_commands_on_two_nodes_name_the_first() -> None:
    made = plan.make("deepseek-v4-pro-dspark", None, hardware.read("2xh100-80x8"))
    words = shlex.split(made.command)
    assert made.fits and made.tp == 16 and made.smallest_tp == 16
    assert words[words.index("--nnodes") + 1] == "2"
    assert {"SGLANG_SHARED_EXPERT_TP1=1", "--dist-init-addr"} <= set(words)
    assert not any(word.startswith("DSPARK_") for word in words)
    off = plan.make(
        "deepseek-v4-pro-dspark", None, hardware.read("2xh100-80x8"), Options(builtin=True)
    )
    assert "DSPARK_PLUGIN=off" in shlex.split(off.command)


# --- the command -----------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_json_has_what_programs_read(llama: Path, drafter: Path) -> None:
    done = run(str(llama), "--drafter", str(drafter), "--hardware", "h100x1", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["fits"] is True and said["label"] == "computed, not run"
    assert set(said["per_gpu_bytes"]) >= {"target weights", "draft KV", "graphs", "activations"}
    assert said["max_concurrency"]["64"] == 48
    assert said["command"].startswith("sglang serve --model-path")


def test_exit_codes(llama: Path, drafter: Path) -> None:
    common = (str(llama), "--drafter", str(drafter), "--hardware", "h100x1")
    assert run(*common).exit_code == 0
    assert run(*common, "--max-total-tokens", "4").exit_code == 1
    assert run(*common, "--pd", "decode").exit_code == 2
    assert isinstance(run(str(llama), "--hardware", "nonsense").exception, ConfigError)
    assert isinstance(run(str(llama)).exception, ConfigError)


def test_the_page_says_what_matters(llama: Path, drafter: Path) -> None:
    text = run(str(llama), "--drafter", str(drafter), "--hardware", "h100x1").stdout
    for word in ("Fits", "computed, not run", "target weights", "Requests at once", "sglang serve"):
        assert word in text
    assert run("--show-hardware", "2xh200x8").stdout.startswith("gpu:")


def test_doctor_plans_for_the_machine_at_hand(llama: Path, drafter: Path) -> None:
    found = doctor._memory(llama, drafter)
    assert found.level == "ok" and "Fits" in found.what and "computed, not run" in found.what
    (llama / "model.safetensors.index.json").unlink()
    missing = doctor._memory(llama, None)
    assert missing.level == "warning" and missing.fix
    write_config(llama, LLAMA | {"architectures": ["Gemma3ForCausalLM"]})
    write_index(llama, dense.target(LLAMA, "Gemma3ForCausalLM", "BF16", "BF16"))
    refused = doctor._memory(llama, drafter)
    assert refused.level == "problem" and "cannot hand its states" in refused.fix
