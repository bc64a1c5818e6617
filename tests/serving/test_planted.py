"""Faults that are planted in the drafter, and weights that are sent: drafting goes off, and the server serves on."""

from __future__ import annotations

import base64
import concurrent.futures
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from dspark_sglang.server import Server, free_port, serve_command
from tests.net.generate import PROMPTS
from tests.net.run import QUIET
from tests.serving.asking import (
    BYSTANDER,
    accept_length,
    body,
    drafting,
    faults,
    together,
)
from tests.serving.conftest import SMALL

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def plain(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without speculation."""
    port = free_port()
    command = serve_command(target, port, dtype="float32", drafter=None, extra=SMALL)
    log = tmp_path_factory.mktemp("plain") / "log"
    with Server(command, port=port, log=log, environment=QUIET) as server:
        server.wait_ready(600.0)
        yield server


# --- faults of the drafter, planted ------------------------------------------------------------------

PLANTED = ("states", "exception", "kv", "law")


@pytest.fixture(scope="module")
def faulty(
    target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A server in whose scheduler faults can be planted, and the file that says which."""
    folder = tmp_path_factory.mktemp("planted")
    switch = folder / "fault"
    own = str(Path(__file__).parent / "faults")
    environment = QUIET | {
        "FAULT_FILE": str(switch),
        "PYTHONPATH": os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")])),
    }
    port = free_port()
    command = serve_command(
        target, port, dtype="float32", drafter=drafter, extra=[*SMALL, "--enable-metrics"]
    )
    with Server(command, port=port, log=folder / "log", environment=environment) as server:
        server.wait_ready(600.0)
        yield server, switch


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_the_drafter_is_contained(
    plain: Server, faulty: tuple[Server, Path], fault: str
) -> None:
    server, switch = faulty
    bodies = [body(text, max_new_tokens=20, ignore_eos=True) for text in PROMPTS[:4]]
    expected = together(plain, bodies)
    drafting(server, 1)
    assert together(server, bodies) == expected
    before, said = faults(server), server.log.read_text(errors="replace").count("drafting is off")
    switch.write_text(fault)
    sampled = [
        one | {"sampling_params": one["sampling_params"] | {"temperature": 1.0}} for one in bodies
    ]
    answers = together(server, [*bodies, *sampled])
    answers += together(server, [*bodies, *sampled])
    switch.write_text("")
    assert [answer for number, answer in enumerate(answers) if number % 8 < 4] == expected * 2
    assert all(answer.status == 200 and answer.usage[1] == 20 for answer in answers)
    record, now = server.dspark(), faults(server)
    assert record is not None
    kind = {"states": "confidence", "law": None}.get(fault, "exception")
    if kind is None:  # it costs acceptance, and scheduling sees to that
        assert record["drafting_stopped"] is None
    else:
        assert record["drafting_stopped"] and not record["drafting"]
        assert now[kind] > before.get(kind, 0)
        metrics = httpx.get(f"{server.url}/metrics", timeout=10.0).text
        counted = [
            line
            for line in metrics.splitlines()
            if line.startswith("dspark_faults_total{") and kind in line
        ]
        assert counted and float(counted[0].rsplit(" ", 1)[1]) > 0
        assert server.log.read_text(errors="replace").count("drafting is off") == said + 1
    drafting(server, 1)
    httpx.post(f"{server.url}/flush_cache", timeout=30.0)
    assert together(server, bodies) == expected
    record = server.dspark()
    assert record is not None and record["drafting_stopped"] is None


def test_a_request_whose_logits_are_nan_ends_alone(
    faulty: tuple[Server, Path], plain: Server
) -> None:
    server, switch = faulty
    drafting(server, 1)
    alone = together(plain, [BYSTANDER])[0]
    spoilt = body(
        temperature=1.0, custom_params={"dspark": {"workload": "spoilt"}}, max_new_tokens=20
    )
    greedy = body(
        custom_params={"dspark": {"workload": "spoilt"}}, max_new_tokens=20, ignore_eos=True
    )
    switch.write_text("target")
    answers = together(server, [spoilt, BYSTANDER, greedy, BYSTANDER])
    switch.write_text("")
    assert answers[0].status == 500 and "weights and dtype" in answers[0].error
    assert answers[1] == answers[3] == alone
    # As torch.argmax does, plain decoding takes the first NaN.
    assert answers[2].status == 200 and set(answers[2].ids[1:]) == {0}
    record = server.dspark()
    assert record is not None and record["drafting_stopped"] is None


def test_a_drafter_with_broken_weights_serves_plain_decoding(
    plain: Server, target: Path, drafter: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "drafter"
    copy.mkdir()
    for path in drafter.iterdir():
        if path.suffix == ".json":
            (copy / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(drafter / "model.safetensors")
    tensors["layers.0.mlp.down_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    (copy / "sts.json").unlink(missing_ok=True)  # made for the sound one
    port = free_port()
    command = serve_command(target, port, dtype="float32", drafter=copy, extra=SMALL)
    with Server(command, port=port, log=tmp_path / "log", environment=QUIET) as server:
        server.wait_ready(600.0)
        assert together(server, [BYSTANDER]) == together(plain, [BYSTANDER])
        record = server.dspark()
        assert record is not None
        assert "layers.0.mlp.down_proj.weight" in record["drafting_stopped"]
        assert record["faults"]["weights"] == 1 and record["rounds"] == 0


# --- weights that are sent ---------------------------------------------------------------------------

NORM, LARGE = "model.norm.weight", "model.layers.3.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


def post(server: Server, path: str, **given: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.post(f"{server.url}/{path}", json=given, timeout=120.0).json()
    return found


def send(server: Server, tensors: Tensors, selector: str = "target") -> dict[str, Any]:
    """Replace weights by tensors; what SGLang said of it."""
    packed = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    assert post(server, "begin_weight_update", selector=selector)["success"]
    given = {"serialized_named_tensors": [packed], "selector": selector}
    found = post(server, "update_weights_from_tensor", **given)
    assert post(server, "end_weight_update")["success"]
    return found


def stopped(server: Server) -> str | None:
    record = server.dspark()
    assert record is not None
    found: str | None = record["drafting_stopped"]
    return found


def test_tensors_of_the_target(plain: Server, faulty: tuple[Server, Path], target: Path) -> None:
    server, _ = faulty
    weights = safetensors.torch.load_file(target / "model.safetensors")
    old = {name: weights[name].float() for name in (NORM, LARGE)}
    bodies = [body(text, max_new_tokens=24, ignore_eos=True) for text in PROMPTS[:4]]
    before = together(plain, bodies)
    try:
        for name, factor, fits in ((LARGE, 3.0, True), (NORM, 1.3, False)):
            changed = {name: old[name] * factor + 0.05}
            for one in (plain, server):
                assert send(one, changed)["success"]
            drafting(server, 1) if fits else None
            texts = together(server, bodies)
            # Packed copies are renewed: with the old ones the text would be the old one.
            assert texts == together(plain, bodies) != before
            assert (stopped(server) is None) is fits
            assert fits or "not made for" in str(stopped(server))
    finally:
        for one in (plain, server):
            assert send(one, old)["success"]
    assert stopped(server) is None and together(server, bodies) == before
    wrong = send(server, {NORM: old[NORM][:5]})
    assert not wrong["success"] and server.alive()
    assert together(server, bodies) == before


def test_tensors_of_the_drafter(faulty: tuple[Server, Path], plain: Server, drafter: Path) -> None:
    server, _ = faulty
    old = safetensors.torch.load_file(drafter / "model.safetensors")
    expected = together(plain, [BYSTANDER])
    length = accept_length(server)
    broken = {"fc.weight": old["fc.weight"].clone()}
    broken["fc.weight"][0, 0] = torch.nan
    assert send(server, broken, "draft")["success"]
    assert "fc.weight" in str(stopped(server))
    assert together(server, [BYSTANDER]) == expected
    assert send(server, {"fc.weight": old["fc.weight"]}, "draft")["success"]
    assert stopped(server) is None
    record = server.dspark()
    assert (
        record is not None
        and "was updated" in record["sts"]
        and set(record["temperatures"]) == {1.0}
    )
    assert accept_length(server) == pytest.approx(length, rel=0.1)
    # Without its Markov head it drafts less well, and as exactly.
    assert send(server, {"fc.weight": torch.zeros_like(old["fc.weight"])}, "draft")["success"]
    assert accept_length(server) < 0.95 * length
    assert together(server, [BYSTANDER]) == expected
    assert send(server, {"fc.weight": old["fc.weight"]}, "draft")["success"]


def test_tensors_from_a_process_group(
    plain: Server, faulty: tuple[Server, Path], target: Path
) -> None:
    from sglang.srt.utils.common import init_custom_process_group

    server, _ = faulty
    old = safetensors.torch.load_file(target / "model.safetensors")[NORM].float()
    expected, port = together(plain, [BYSTANDER]), free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(
            post, server, "init_weights_update_group", master_address="127.0.0.1", master_port=port,
            rank_offset=1, world_size=2, group_name="test", backend="gloo",
        )  # fmt: skip
        group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="test"
        )  # fmt: skip
        assert joining.result()["success"]
        for value, fits in ((old * 1.3 + 0.05, False), (old, True)):
            assert post(server, "begin_weight_update", selector="all")["success"]
            loading = pool.submit(
                post, server, "update_weights_from_distributed", names=[NORM], dtypes=["float32"],
                shapes=[list(value.shape)], group_name="test",
            )  # fmt: skip
            torch.distributed.broadcast(value, src=0, group=group)
            assert loading.result()["success"]
            assert post(server, "end_weight_update")["success"]
            assert (stopped(server) is None) is fits
            assert (together(server, [BYSTANDER]) == expected) is fits
        assert post(server, "destroy_weights_update_group", group_name="test")["success"]
