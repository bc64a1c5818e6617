"""What has to hold before a server starts, and before it is ready."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import file_entry, verify_files
from dspark_sglang import probe, rdma
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.serving import warmup
from tests.deploy import generate


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    files = {p.name: {"sha256": file_entry(p).sha256, "size": p.stat().st_size}
             for p in path.iterdir()}  # fmt: skip
    manifest = path.parent / f"{path.name}.sums.json"
    manifest.write_text(json.dumps({"files": files, "format": 1}))
    return manifest


def test_files_are_what_the_list_says(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    manifest = _folder(folder)
    assert verify_files(folder, manifest) == 2
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(PackageError, match=r"SHA-256.*target\.sums\.json"):
        verify_files(folder, manifest)
    (folder / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(PackageError, match="has 6 bytes"):
        verify_files(folder, manifest)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PackageError, match="missing"):
        verify_files(folder, manifest)


@pytest.mark.parametrize("name", ["more.safetensors", "pytorch_model.bin", "x.pt"])
def test_weights_that_are_not_listed_are_refused(tmp_path: Path, name: str) -> None:
    manifest = _folder(tmp_path / "target")
    (tmp_path / "target" / name).write_bytes(b"other")
    with pytest.raises(PackageError, match="does not list"):
        verify_files(tmp_path / "target", manifest)


def test_files_are_held_against_their_checksums(tmp_path: Path) -> None:
    pairs = []
    for name in ("target", "drafter"):
        manifest = _folder(tmp_path / name)
        pairs += ["--files", f"{tmp_path / name}={manifest}"]
    done = CliRunner().invoke(app, ["verify", *pairs])
    assert done.exit_code == 0 and done.output.count("2 files") == 2
    (tmp_path / "drafter/config.json").write_text("[]")
    done = CliRunner().invoke(app, ["verify", *pairs])
    assert isinstance(done.exception, PackageError)
    done = CliRunner().invoke(app, ["verify", "--files", "no-pair"])
    assert isinstance(done.exception, ConfigError)


class Manager:
    """The part of SGLang's tokenizer manager that a warm-up uses."""

    def __init__(self, *, active: bool = True, flip: bool = False, lead: float = 2.0) -> None:
        self.model_config = SimpleNamespace(vocab_size=1000)
        self._active, self._flip, self._lead = active, flip, lead
        self.speculates_always, self.cleared = False, 0

    async def get_internal_state(self) -> list[dict[str, Any]]:
        return [{"dspark_info_record": {"active": self._active}}]

    async def flush_cache(self) -> None:
        pass

    async def set_internal_state(self, request: Any) -> None:
        self.cleared += int(request.server_args == {"dspark_clear_info_records": 1})

    async def generate_request(self, request: Any, _: Any) -> Any:
        plain = request.sampling_params["custom_params"] == {"dspark": {"max_draft_tokens": 0}}
        ids = [(sum(request.input_ids) + i) % 997 for i in range(16)]
        rounds = 16 if plain and not self.speculates_always else 8
        if self._flip and not plain:
            ids[9] += 1
        top = [[[-0.1, i, None], [-0.1 - self._lead, i + 1, None]] for i in ids]
        yield {"output_ids": ids,
               "meta_info": {"spec_verify_ct": rounds, "output_top_logprobs": top}}  # fmt: skip


def test_a_server_that_agrees_with_itself_may_start() -> None:
    manager = Manager()
    asyncio.run(warmup.check("null", manager))
    assert manager.cleared == 1
    asyncio.run(warmup.check("null", Manager(flip=True, lead=0.1)))  # a near-tie


@pytest.mark.parametrize(
    ("manager", "message"),
    [(Manager(active=False), "does not run this plugin"), (Manager(flip=True), "token 9 is")],
    ids=["builtin", "other-text"],
)
def test_a_server_that_does_not_may_not(manager: Manager, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        asyncio.run(warmup.check("null", manager))


def test_nothing_is_compared_where_drafting_cannot_be_switched_off() -> None:
    manager = Manager(flip=True)
    manager.speculates_always = True
    asyncio.run(warmup.check("null", manager))
    assert manager.cleared == 0


@pytest.mark.parametrize(
    ("info", "builtin", "wrong"),
    [
        ({"speculative_algorithm": "DSPARK", "internal_states": [{"dspark_info_record": {"active": True}}]}, False, None),
        ({"speculative_algorithm": "DSPARK", "internal_states": [{"dspark_info_record": {"steps": 1}}]}, False, "builtin"),
        ({"speculative_algorithm": "DSPARK", "internal_states": [{}]}, True, None),
        ({"speculative_algorithm": None}, True, "not DSPARK"),
    ],
    ids=["ours", "builtin", "builtin-wanted", "none"],
)  # fmt: skip
def test_the_probe_judges(info: dict[str, Any], builtin: bool, wrong: str | None) -> None:
    found = probe.judge(info, builtin=builtin)
    assert found is None if wrong is None else wrong in str(found)


def _port(root: Path, device: str, *, layer: str, gids: dict[int, tuple[str, str]]) -> None:
    port = root / device / "ports/1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs/types").mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "link_layer").write_text(layer + "\n")
    for index, (kind, gid) in gids.items():
        (port / "gid_attrs/types" / str(index)).write_text(kind + "\n")
        (port / "gids" / str(index)).write_text(gid + "\n")


LOCAL, V4 = "fe80:0000:0000:0000:0000:0000:0000:0001", "0000:0000:0000:0000:0000:ffff:0a00:0001"
ROCE = {0: ("IB/RoCE v1", LOCAL), 1: ("RoCE v2", LOCAL), 2: ("IB/RoCE v1", V4), 3: ("RoCE v2", V4)}


def test_rdma_devices_are_found(tmp_path: Path) -> None:
    _port(tmp_path, "mlx5_0", layer="Ethernet", gids=ROCE)
    _port(tmp_path, "mlx5_1", layer="InfiniBand", gids={})
    _port(tmp_path, "mlx5_2", layer="Ethernet", gids={1: ("RoCE v2", LOCAL)})
    assert rdma.environment(tmp_path) == {
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_IB_GID_INDEX": "3",
    }
    _port(tmp_path, "mlx5_3", layer="Ethernet", gids={5: ("RoCE v2", V4)})
    with pytest.raises(ConfigError, match="different GID indices"):
        rdma.environment(tmp_path)


def test_no_rdma_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no active port"):
        rdma.environment(tmp_path)


def test_serve_refuses_a_server_that_would_not_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["serve", "--dry-run", "--model-path", "m"]
    assert isinstance(CliRunner().invoke(app, words).exception, ConfigError)
    done = CliRunner().invoke(app, [*words, "--speculative-algorithm", "DSPARK"])
    assert done.output.strip() == (
        "python -m sglang.launch_server --model-path m --speculative-algorithm DSPARK"
    )
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    done = CliRunner().invoke(app, [*words, "--speculative-algorithm", "DSPARK"])
    assert "leaves this plugin out" in str(done.exception)


def test_serve_adds_what_is_planned_and_not_given() -> None:
    done = CliRunner().invoke(
        app,
        ["serve", "--dry-run", "--hardware", "h100-80x8", "--model-path", "deepseek-v4-flash-dspark",
         "--speculative-algorithm", "DSPARK", "--max-running-requests", "7"],
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert "DSPARK_PLUGIN" not in done.output and "--tp-size 8" in done.output
    assert "--max-running-requests 7" in done.output and "48" not in done.output


def test_flags_of_a_plan_for_two_nodes() -> None:
    planned = generate.split(
        "A=1 sglang serve --model-path M --speculative-algorithm DSPARK --tp-size 16 --nnodes 2 "
        "--node-rank 0 --dist-init-addr HEAD:20000", "x")  # fmt: skip
    assert planned.environment == {"A": "1"}
    words = [operation["value"] for operation in generate.patch(planned, rank="1", head="h:1")]  # type: ignore[index]
    assert words == [
        "--tp-size",
        "16",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--dist-init-addr",
        "h:1",
    ]
