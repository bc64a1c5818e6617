"""``make deploy-check``: every overlay through every validator, into docs/results/deploy.json.

A validator that cannot be had here is written down as skipped, never as passed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/deploy"))

import apiserver  # noqa: E402
import kubernetes_validate  # noqa: E402
import router  # noqa: E402
import sglang_source  # noqa: E402
import tools  # noqa: E402
import yaml  # noqa: E402
from manifest_lint import lint  # noqa: E402
from manifest_network import policies_unreachable  # noqa: E402

from dspark_sglang.artifacts import write_bytes  # noqa: E402
from dspark_sglang.provenance import machine, versions  # noqa: E402
from tests.deploy.generate import kubectl, overlays, render  # noqa: E402

DEPLOY = ROOT / "deploy"
#: Policies that do not apply, and why.
WAIVED = {
    "CKV_K8S_21": "no namespace is set: `kubectl -n` chooses it",
    "CKV_K8S_43": "images are named by release; a registry's digest is the operator's to pin",
    "CKV_K8S_15": "images are loaded into the node in the recipe, so Always would not start",
    "CKV_K8S_35": "tokens reach programs that read them from the environment",
    "CKV_K8S_38": "the router watches pods and needs its account's token",
    "CKV_K8S_25": "IPC_LOCK for RDMA only: manifest_lint takes it only where the pod states it",
}


def schema(docs: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Errors of core kinds, and the documents that have no core schema."""
    version, errors, custom = kubernetes_validate.latest_version(), [], []
    for doc in docs:
        try:
            kubernetes_validate.validate(doc, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            custom.append(doc)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"{doc['kind']}: {error.message}")
    return errors, custom


def crds(custom: list[dict[str, Any]], models: Path) -> list[dict[str, Any]]:
    """What the CRDs' own models say of each document."""
    done = subprocess.run(
        ["node", str(ROOT / "tests/deploy/crds.mjs"), str(models)],
        input=json.dumps(custom), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def policies(text: str) -> list[str]:
    """What checkov objects to, without what is waived."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all.yaml").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [tools.checkov(), "--framework", "kubernetes", "--compact", "--quiet", "-o", "json",
             "--skip-check", ",".join(WAIVED), "-d", folder],
            capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
    if not done.stdout.strip().startswith(("{", "[")):
        raise SystemExit(f"deploy-check: checkov failed: {done.stderr[-400:]}")
    found = json.loads(done.stdout)
    failed = found.get("results", {}).get("failed_checks", [])
    return [f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in failed]


def check(
    overlay: Path, flags: Any, known: Any, models: Path | None, api: apiserver.Api | None
) -> dict[str, Any]:
    """One overlay through every validator."""
    text = render(overlay)  # raises on a warning of kustomize
    docs = list(yaml.safe_load_all(text))
    validators, skipped = (
        ["kustomize", "kubernetes-validate --strict", "manifest_lint", "checkov"],
        [],
    )
    errors, custom = schema(docs)
    errors += [
        f"{f.rule} {f.where}: {f.message}" for f in lint(docs, flags=flags, sglang_env=known)
    ]
    warnings = policies(text)
    if custom and models is None:
        skipped.append("CRD models (npm)")
    elif custom and models is not None:
        validators.append("CRD models (npm)")
        for found in crds(custom, models):
            if not found["checked"]:
                skipped.append(f"{found['name']}: no model of its CRD is published")
            elif "error" in found:
                errors.append(f"{found['name']}: {found['error']}")
    committed = DEPLOY / "rendered" / f"{overlay.name}.yaml"
    if not committed.exists() or committed.read_text(encoding="utf-8").split("\n", 1)[1] != text:
        errors.append(f"{committed.name} is stale: make deploy-rendered")
    if api is None:
        skipped.append("API server: KUBE_APISERVER_BIN is not set")
    else:
        validators.append("API server")
        core = [doc for doc in docs if doc not in custom]
        refused, warned = apiserver.check(api, overlay.name, core)
        errors, warnings = errors + refused, warnings + warned
    return {"documents": len(docs), "errors": errors, "warnings": warnings,
            "validators": validators, "skipped": skipped}  # fmt: skip


def rules() -> dict[str, Any]:
    """promtool's verdict of the rules and of their tests."""
    program = tools.promtool()
    if program is None:
        return {"skipped": "no promtool"}
    folder = DEPLOY / "observability"
    errors = []
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]):
        done = subprocess.run(
            [program, *command], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors.append((done.stdout + done.stderr)[-400:])
    return {"errors": errors, "validators": ["promtool check rules", "promtool test rules"]}


def images() -> dict[str, Any]:
    """hadolint's verdict of the Dockerfiles."""
    files = sorted((DEPLOY / "docker").glob("Dockerfile*"))
    done = subprocess.run(
        [tools.hadolint(), *map(str, files)], capture_output=True, text=True, check=False
    )
    errors = (done.stdout + done.stderr).strip().splitlines() if done.returncode else []
    return {"files": [path.name for path in files], "errors": errors, "validators": ["hadolint"]}


def routers() -> dict[str, Any]:
    """The first overlay's router, run for real against a rogue worker."""
    rendered = ((path.name, list(yaml.safe_load_all(render(path)))) for path in overlays(DEPLOY))
    for name, docs in rendered:
        chosen = router.router_of(docs)
        if chosen is None:
            continue
        release = chosen[0]["image"].rsplit(":", 1)[1]
        try:
            python = tools.router(release)
        except SystemExit as error:
            return {"skipped": f"sglang-router {release} could not be fetched: {error}"}
        found = router.run(python, docs)
        return {"overlay": name, "release": release, "errors": router.faults(found), "found": found}
    return {"skipped": "no overlay has a router"}


def main() -> int:
    """Check everything and write the results."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        print("deploy-check: SGLang is not installed: its flags cannot be read", file=sys.stderr)
        return 2
    package = Path(spec.origin).parent
    flags, known = sglang_source.sglang_flags(package), sglang_source.sglang_environment(package)
    models = tools.npm_models()
    found = {}
    with contextlib.ExitStack() as stack:
        api = None
        if os.environ.get("KUBE_APISERVER_BIN"):
            api = stack.enter_context(apiserver.served(kubectl()))
        else:
            print("API server: skipped, KUBE_APISERVER_BIN is not set")
        for overlay in overlays(DEPLOY):
            found[overlay.name] = result = check(overlay, flags, known, models, api)
            print(
                f"{overlay.name}: {len(result['errors'])} errors, {len(result['warnings'])} warnings"
            )
            for line in result["errors"] + result["warnings"]:
                print(f"  {line}")
    promtool, dockerfiles, routed = rules(), images(), routers()
    others = (promtool, dockerfiles, routed)
    for line in [line for result in others for line in result.get("errors", [])]:
        print(f"  {line}")
    results = {"command": "make deploy-check", "machine": machine(), "versions": versions(),
               "overlays": found, "policies_unreachable": policies_unreachable(DEPLOY),
               "rules": promtool, "images": dockerfiles, "router": routed, "waived": WAIVED}  # fmt: skip
    content = (json.dumps(results, indent=1) + "\n").encode()
    for path in (ROOT / "runs/deploy/deploy.json", ROOT / "docs/results/deploy.json"):
        write_bytes(path, content)
    wrong = any(r["errors"] or r["warnings"] for r in found.values())
    return 1 if wrong or any(result.get("errors") for result in others) else 0


if __name__ == "__main__":
    raise SystemExit(main())
