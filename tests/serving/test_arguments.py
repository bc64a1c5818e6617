"""Start-up checks: a wrong argument costs a line, before any weights are read."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dspark_sglang.checkpoint import read_header
from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.serving import arguments
from dspark_sglang.verify_mode import Server, choose, why_whole
from tests.layouts.drafter_samples import FLAT, SHAPES, TARGET, actionable, write

MODE = "SGLANG_RAGGED_VERIFY_MODE"


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write(tmp_path / "drafter", FLAT, SHAPES)


def view(tmp_path: Path, drafter: Path | None, **flags: Any) -> SimpleNamespace:
    """The arguments our checks read, as SGLang resolved them."""
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(TARGET | flags.pop("target", {})))
    unset = {
        "speculative_dspark_block_size": None,
        "speculative_num_draft_tokens": None,
        "tp_size": 1,
        "attn_dp_size": 1,
    }
    return SimpleNamespace(
        model_path=str(target),
        speculative_draft_model_path=None if drafter is None else str(drafter),
        device="cpu",
        dtype="bfloat16",
        **unset | flags,
    )


# --- drafter and target ----------------------------------------------------------------------


def test_the_drafters_own_gamma_passes(tmp_path: Path, drafter: Path) -> None:
    flags = {"speculative_dspark_block_size": 3, "speculative_num_draft_tokens": 4}
    config = arguments._check_drafter(view(tmp_path, drafter, **flags))
    assert config is not None and config.gamma == 3


@pytest.mark.parametrize(
    ("flag", "given", "expected"),
    [("speculative_dspark_block_size", 4, "3:"), ("speculative_num_draft_tokens", 3, "4:")],
)
def test_a_wrong_gamma(tmp_path: Path, drafter: Path, flag: str, given: int, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        arguments._check_drafter(view(tmp_path, drafter, **{flag: given}))
    option = "--" + flag.replace("_", "-")
    actionable(caught.value, found=f"{option} is {given}", expected=expected)
    assert option in caught.value.fix


def test_no_drafter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments._check_drafter(view(tmp_path, None))
    actionable(caught.value, found="without a drafter", expected="--speculative-draft-model-path")


def test_a_drafter_nested_in_the_target_is_found(tmp_path: Path) -> None:
    given = view(tmp_path, None)
    write(tmp_path / "target" / "dspark", FLAT, SHAPES)
    config = arguments._check_drafter(given)
    assert config is not None and config.gamma == 3


def test_a_bundle_is_looked_into_before_it_is_loaded(tmp_path: Path) -> None:
    tiny.write(tmp_path, published=True)
    given = view(tmp_path, None)
    given.model_path = str(tmp_path)
    found = arguments._check_drafter(given)
    assert found is not None and found.bundled and found.gamma == 5
    assert arguments._drafter_directory(given) == tmp_path
    for path in tmp_path.glob("model-*-of-*.safetensors"):
        if any(name.startswith("mtp.") for name in read_header(path).tensors):
            path.unlink()
    with pytest.raises(CheckpointError):
        arguments._check_drafter(given)


def test_a_hub_name_is_left_to_sglang(tmp_path: Path) -> None:
    assert arguments._check_drafter(view(tmp_path, Path("some-org/some-drafter"))) is None


def test_a_foreign_target(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        arguments._check_drafter(view(tmp_path, drafter, target={"hidden_size": 576}))
    actionable(caught.value, found="hidden_size is 8", expected="576")


def test_a_damaged_drafter(tmp_path: Path, drafter: Path) -> None:
    (drafter / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match="is damaged"):
        arguments._check_drafter(view(tmp_path, drafter))


# --- mode --------------------------------------------------------------------------------------


FREE = Server(backend="fa3")
WHOLE: dict[str, dict[str, Any]] = {
    "the attention backend flashinfer": {"backend": "flashinfer"},
    "the attention backend triton": {"backend": "triton", "latent": True},
    "the attention backend trtllm_mha": {"backend": "trtllm_mha", "xqa": True},
    "the target's recurrent layers": {"recurrent": True},
    "--enable-lora": {"lora": True},
    "--enable-two-batch-overlap": {"two_batch_overlap": True},
    "--disable-cuda-graph-padding": {"padded": False},
    "context parallelism": {"attention_cp": 2},
    "attention data parallelism with a drafter of its own": {"attention_dp": 2},
    "attention data parallelism with --moe-a2a-backend megamoe": {
        "attention_dp": 2, "moe_a2a": "megamoe", "bundled": True,
    },
    "prefills coordinated over attention data parallelism": {
        "attention_dp": 2, "coordinated": True, "bundled": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", WHOLE)
def test_whole_blocks_where_sglang_verifies_no_others(reason: str) -> None:
    whole = why_whole(msgspec.structs.replace(FREE, **WHOLE[reason]))
    assert whole == [reason]
    assert choose(None, whole) == choose("static", whole) == "static"
    with pytest.raises(ConfigError) as caught:
        choose("compact", whole)
    actionable(caught.value, found=reason, expected="static or unset")
    assert MODE in caught.value.fix and "--attention-backend fa3" in caught.value.fix


@pytest.mark.parametrize(
    "server",
    [
        FREE,
        Server(backend="fa4"),
        Server(backend="trtllm_mha"),
        Server(backend="flashinfer", latent=True),
        Server(backend="dsv4", attention_dp=8, bundled=True),
        Server(backend="fa3", moe_a2a="deepep"),
    ],
)
def test_blocks_of_any_length_where_it_can(server: Server) -> None:
    assert choose(None, why_whole(server)) == choose("compact", why_whole(server)) == "compact"
    assert choose("static", why_whole(server)) == "static"


def test_every_reason_at_once() -> None:
    assert why_whole(Server(backend="triton", lora=True)) == [
        "the attention backend triton",
        "--enable-lora",
    ]


def test_a_mode_that_there_is_not() -> None:
    with pytest.raises(ConfigError) as caught:
        choose("cap-accept", [])
    actionable(caught.value, found=f"{MODE} is 'cap-accept'", expected="compact, static or unset")
    assert "DSPARK_PLUGIN=off" in caught.value.fix


@pytest.mark.parametrize(("asked", "mode"), [(None, "compact"), ("static", "static")])
def test_the_mode_is_set_for_every_process(
    asked: str | None, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(MODE, "restored afterwards")
    monkeypatch.delenv(MODE) if asked is None else monkeypatch.setenv(MODE, asked)
    given: Any = view(tmp_path, None)
    arguments._choose_mode(given, given)
    assert os.environ[MODE] == mode


def test_a_refusal_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.stop(ConfigError("Found.", expected="other", fix="Fix."))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "dspark: error: Found. Expected other. Fix.\n"
    assert captured.out == ""


# --- port and memory -------------------------------------------------------------------------


def test_a_free_port_passes_and_stays_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments.check_port("127.0.0.1", port)
    arguments.check_port(None, port)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            arguments.check_port("127.0.0.1", port)
    actionable(caught.value, found=f"Port {port} on 127.0.0.1 is taken", expected="a free port")
    assert "--port" in caught.value.fix


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError) as caught:
        arguments.check_port("192.0.2.1", 1)  # reserved for documentation
    actionable(caught.value, found="cannot be used", expected="a free port")


def test_weights_are_counted_from_headers(drafter: Path, tmp_path: Path) -> None:
    wanted = 0
    for shape in SHAPES.values():
        size = 1
        for extent in shape:
            size *= extent
        wanted += size
    assert arguments.weight_elements(drafter) == wanted
    assert arguments.weight_elements(tmp_path) == 0
    (drafter / "model.safetensors").write_bytes(b"cut")
    assert arguments.weight_elements(drafter) == 0


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A sparse target of 4 TiB: only its header takes room, and only that is read."""
    path = tmp_path / "target" / "model.safetensors"
    path.parent.mkdir()
    entry = {"dtype": "BF16", "shape": [2**41], "data_offsets": [0, 2**42]}
    header = json.dumps({"w": entry}).encode()
    try:
        with path.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + 2**42)
    except OSError:
        pytest.skip("this file system has no files of 4 TiB")
    yield path.parent
    path.unlink()


def test_weights_that_cannot_fit(tmp_path: Path, drafter: Path, huge: Path) -> None:
    assert arguments.weight_elements(huge) == 2**41
    given = view(tmp_path, drafter)
    with pytest.raises(ConfigError) as caught:
        arguments.check_memory(given)
    actionable(caught.value, found="of memory are free", expected="4096.0 GiB of weights")
    given.device = "cuda"
    arguments.check_memory(given)


def test_weights_that_fit(tmp_path: Path, drafter: Path) -> None:
    arguments.check_memory(view(tmp_path, drafter))


# --- command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "role"),
    [
        ("--model-path", "target"),
        ("--model", "target"),
        ("--speculative-draft-model-path", "drafter"),
        ("--speculative-draft-model", "drafter"),
    ],
)
@pytest.mark.parametrize("joined", [True, False], ids=["flag=value", "flag value"])
def test_a_wrong_local_path_is_found_before_sglang_sees_it(
    tmp_path: Path, flag: str, role: str, joined: bool
) -> None:
    missing = str(tmp_path / "typo")
    with pytest.raises(CheckpointError) as caught:
        arguments.check([f"{flag}={missing}"] if joined else [flag, missing])
    actionable(caught.value, found=f"{role} path {missing}", expected="a model directory")


@pytest.mark.parametrize(
    "argv",
    [
        ["--model-path", "org/name"],
        ["--model-path"],
        ["--port", "/no/such/path"],
        ["--model-path="],
    ],
    ids=["hub-name", "no-value", "other-flag", "empty"],
)
def test_what_is_not_plainly_local_is_left_to_sglang(argv: list[str]) -> None:
    arguments.check(argv)


def test_existing_models_pass(drafter: Path) -> None:
    arguments.check(["--model-path", str(drafter), f"--speculative-draft-model={drafter}"])


# --- placement -------------------------------------------------------------------------------


def test_a_placement_that_cannot_be_is_refused_before_weights_load(
    tmp_path: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_PLACEMENT", "shard")
    given = view(tmp_path, drafter, tp_size=3)
    config = arguments._check_drafter(given)
    with pytest.raises(ConfigError, match="do not divide over 3 ranks"):
        arguments._check_placement(given, config)
    arguments._check_placement(view(tmp_path, drafter, tp_size=1), config)


def test_working_space_is_wanted_for_every_rank(
    tmp_path: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights = arguments.weight_elements(drafter)
    assert write_weights > 0
    free = SimpleNamespace(available=5 << 30)
    monkeypatch.setattr(arguments.psutil, "virtual_memory", lambda: free)
    arguments.check_memory(view(tmp_path, drafter, tp_size=2))
    with pytest.raises(ConfigError, match=r"5\.0 GiB of memory are free"):
        arguments.check_memory(view(tmp_path, drafter, tp_size=3))


# --- starts that no CPU can serve ------------------------------------------------------------


def cpu_start(tmp_path: Path, **flags: Any) -> SimpleNamespace:
    off = {
        "enable_hierarchical_cache": False,
        "enable_memory_saver": False,
        "enable_dp_attention": False,
    }
    return view(tmp_path, None, **off | flags)


HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_divide_the_target(tmp_path: Path, ranks: int) -> None:
    from dspark_sglang.serving.cpu import platform

    platform.check(cpu_start(tmp_path, tp_size=ranks, target=HEADS))
    platform.check(cpu_start(tmp_path, tp_size=ranks, target={"text_config": HEADS}))


@pytest.mark.parametrize("target", [HEADS, {"text_config": HEADS}], ids=["flat", "nested"])
@pytest.mark.parametrize("ranks", [2, 4, 9])
def test_ranks_that_do_not(tmp_path: Path, ranks: int, target: dict[str, Any]) -> None:
    from dspark_sglang.serving.cpu import platform

    with pytest.raises(ConfigError) as caught:
        platform.check(cpu_start(tmp_path, tp_size=ranks, target=target))
    actionable(caught.value, found=f"--tp is {ranks}", expected="--tp 1 or 3")
    assert "9 query heads, 3 key heads" in caught.value.found


@pytest.mark.parametrize(
    "flags",
    [
        {"target": HEADS, "attn_dp_size": 2},
        {"target": HEADS, "enable_dp_attention": True},
        {"target": HEADS | {"kv_lora_rank": 8}},
        {"model_path": "some-org/some-target"},
    ],
    ids=["data-parallel", "its-flag", "latent", "hub"],
)
def test_what_divides_otherwise_is_left_to_sglang(tmp_path: Path, flags: dict[str, Any]) -> None:
    from dspark_sglang.serving.cpu import platform

    name = flags.pop("model_path", None)
    given = cpu_start(tmp_path, tp_size=2, **flags)
    given.model_path = name or given.model_path
    platform.check(given)


@pytest.mark.parametrize("flag", ["enable_hierarchical_cache", "enable_memory_saver"])
def test_options_of_accelerators(tmp_path: Path, flag: str) -> None:
    from dspark_sglang.serving.cpu import platform

    option = "--" + flag.replace("_", "-")
    with pytest.raises(ConfigError) as caught:
        platform.check(cpu_start(tmp_path, **{flag: True}))
    actionable(caught.value, found=f"{option} is set", expected="without it")


def test_the_platform_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dspark_sglang.serving.cpu.platform import CpuPlatform

    with pytest.raises(SystemExit) as caught:
        CpuPlatform().apply_server_args_defaults(cpu_start(tmp_path, tp_size=2, target=HEADS))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("dspark: error: --tp is 2")
