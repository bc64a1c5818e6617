"""The repository's shape: who may import whom, where names resolve, how long a module may be."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import structure

ROOT = Path(__file__).resolve().parents[1]
#: Folder that holds a package's source, and the package's name.
PACKAGES = (
    (".", "dspark_sglang"),
    ("kernels", "dspark_kernels"),
    ("packaging", "dspark_packaging"),
    ("loadtests", "dspark_loadtests"),
)
SOURCE_ROOTS = ("kernels", "packaging", "loadtests")
MAX_LINES = 500
#: These read or set SGLang's own switches (``SGLANG_*``), as SGLang does.
SGLANG_SWITCHES = (
    "dspark_sglang.serving.entry",
    "dspark_sglang.serving.arguments",
    "dspark_sglang.diagnosis",
)


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module


def modules(root: Path) -> Iterator[Module]:
    for folder, package in PACKAGES:
        base = root / folder
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield Module(name, path, ast.parse(path.read_text(encoding="utf-8")))


def imports(module: Module) -> set[str]:
    """Every name a module imports, anywhere in it; ``from a import b`` counts as ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                package = module.name.split(".")
                if module.path.name != "__init__.py":
                    package = package[:-1]
                kept = package[: len(package) - node.level + 1]
                parent = ".".join([*kept, parent]).rstrip(".")
            found |= {f"{parent}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


# --- the rules: one line of text for each import that breaks one ---------------------------------

#: Nothing here may import what runs on top of it.
FOUNDATION = tuple(
    f"dspark_sglang.{name}"
    for name in ("errors", "config", "values", "checkpoint", "artifacts", "core")
)
TOOLS = (
    "dspark_sglang.cli",
    "dspark_sglang.demo",
    "dspark_sglang.server",
    "dspark_sglang.training",
    "dspark_sglang.evaluation",
    "dspark_sglang.simulate",
    "dspark_sglang.planning",
    "dspark_packaging",
    "dspark_loadtests",
)


def broken_rule(module: str, imported: str) -> str | None:
    core_may = ("torch", "numpy", "scipy", "dspark_sglang.core", "dspark_sglang.errors")
    standard = imported.split(".")[0] in sys.stdlib_module_names
    rules = {
        "core imports torch, numpy, scipy and itself only": within(module, "dspark_sglang.core")
        and not (standard or within(imported, *core_may)),
        "layouts import the foundation, torch and safetensors only": within(
            module, "dspark_sglang.layouts"
        )
        and within(imported, *TOOLS, "dspark_sglang.serving", "dspark_kernels", "sglang", "triton"),
        "kernels import torch and triton only": within(module, "dspark_kernels")
        and not (standard or within(imported, "torch", "triton", "dspark_kernels")),
        "only serving imports sglang": within(imported, "sglang")
        and not within(module, "dspark_sglang.serving"),
        "the wheel imports nothing of the checkout": within(imported, "tests", "benchmarks"),
        "nobody imports the command line": within(imported, "dspark_sglang.cli")
        and not within(module, "dspark_sglang.cli"),
        "serving imports no tools": within(module, "dspark_sglang.serving")
        and within(imported, *TOOLS),
        "the foundation imports nothing above it": within(module, *FOUNDATION)
        and within(imported, *TOOLS, "dspark_sglang.serving", "dspark_kernels"),
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def violations(root: Path) -> list[str]:
    return [
        f"{module.name} imports {imported}: {rule}"
        for module in modules(root)
        for imported in sorted(imports(module))
        if (rule := broken_rule(module.name, imported)) is not None
    ]


def environment_reads(root: Path) -> list[str]:
    """Uses of the process environment outside :mod:`dspark_sglang.config`.

    Allowed: SGLang's own variables in the modules of ``SGLANG_SWITCHES``; a copy of the whole
    environment, to start a process with.
    """
    found = []
    for module in modules(root):
        if module.name == "dspark_sglang.config":
            continue
        constants = {
            target.id: node.value.value
            for node in module.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        parents = {
            child: node for node in ast.walk(module.tree) for child in ast.iter_child_nodes(node)
        }
        for node in ast.walk(module.tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            if imported and {a.name for a in node.names} & {"environ", "getenv"}:
                found.append(f"{module.name}:{node.lineno} imports it from os")
            if text not in ("os.environ", "os.getenv", "os.environb", "os.putenv"):
                continue
            name = _variable(parents[node], parents, constants)
            if module.name in SGLANG_SWITCHES and name.startswith("SGLANG_"):
                continue
            if text == "os.environ" and _copied(node, parents):
                continue
            found.append(f"{module.name}:{node.lineno} uses {name or text}")
    return found


def _variable(node: ast.AST, parents: dict[ast.AST, ast.AST], constants: dict[str, object]) -> str:
    """The variable named by ``os.environ[X]``, ``os.environ.get(X)`` or ``os.getenv(X)``."""
    key: ast.expr | None = None
    if isinstance(node, ast.Subscript):
        key = node.slice
    elif isinstance(node, ast.Call) and node.args:
        key = node.args[0]
    elif isinstance(node, ast.Attribute):
        return _variable(parents[node], parents, constants)
    if isinstance(key, ast.Name):
        return str(constants.get(key.id, ""))
    return str(key.value) if isinstance(key, ast.Constant) else ""


def _copied(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """``{**os.environ}``, ``dict(os.environ)``, ``os.environ | x`` or ``os.environ.copy()``."""
    parent = parents[node]
    return (
        isinstance(parent, ast.Dict)
        or (isinstance(parent, ast.Call) and ast.unparse(parent.func) == "dict")
        or (isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.BitOr))
        or (isinstance(parent, ast.Attribute) and parent.attr == "copy")
    )


# --- the repository keeps them ---------------------------------------------------------------


def test_every_package_is_seen() -> None:
    names = {module.name for module in modules(ROOT)}
    assert {package for _, package in PACKAGES} <= names
    assert {"dspark_sglang.core.accept", "dspark_sglang.serving.cpu.attention"} <= names


def test_dependencies_point_one_way() -> None:
    assert violations(ROOT) == []


def test_the_worker_reaches_neither_kernels_nor_what_the_plugin_installs() -> None:
    """Implementations of the operations are named in a table, and the CPU platform is the plugin's to install."""
    far = (
        "dspark_kernels",
        *TOOLS,
        *(f"dspark_sglang.serving.{name}" for name in ("hooks", "arguments")),
    )
    found = structure.reached(structure.modules(ROOT))
    assert not [name for name in found if within(name, *far)]
    assert {name for name in found if within(name, "dspark_sglang.serving.cpu")} <= {
        "dspark_sglang.serving.cpu.packing"
    }


def test_the_environment_is_read_in_one_module() -> None:
    assert environment_reads(ROOT) == []


def test_no_module_is_too_long() -> None:
    long = {
        module.name: lines
        for module in modules(ROOT)
        if (lines := len(module.path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_source_roots_are_not_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("through", ["working-directory", "PYTHONPATH"])
@pytest.mark.parametrize("name", ["kernels", "packaging"])
def test_names_we_share_with_others_stay_theirs(name: str, through: str, tmp_path: Path) -> None:
    """SGLang, torch and transformers import these; our folders of the same name must not win."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    at_root = through == "working-directory"
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}; print({name}.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT if at_root else tmp_path,
        env={"PATH": "", "HOME": str(tmp_path)} | ({} if at_root else {"PYTHONPATH": str(ROOT)}),
    )
    path = Path(done.stdout.strip())
    assert "site-packages" in path.parts or "dist-packages" in path.parts, path
    assert not path.is_relative_to(ROOT / name)


# --- and the checks notice when it does not ---------------------------------------------------


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("dspark_sglang/core/bad.py", "import sglang", "core imports torch, numpy"),
        ("dspark_sglang/core/bad.py", "import triton", "core imports torch, numpy"),
        ("dspark_sglang/core/bad.py", "from ..config import Settings", "core imports torch"),
        ("dspark_sglang/core/x/__init__.py", "from ...serving import y", "core imports torch"),
        ("dspark_sglang/core/bad.py", "def f():\n    import msgspec", "core imports torch"),
        ("dspark_sglang/core/bad.py", "import dspark_sglang.layouts.v4", "core imports torch"),
        ("dspark_sglang/layouts/bad.py", "import sglang", "layouts import the foundation"),
        ("dspark_sglang/layouts/bad.py", "import dspark_packaging.records", "layouts import the"),
        ("dspark_sglang/config.py", "from sglang.srt import environ", "only serving imports sg"),
        ("dspark_sglang/cli/bad.py", "import tests.exactness", "the wheel imports nothing of"),
        ("loadtests/dspark_loadtests/bad.py", "import benchmarks", "the wheel imports nothing of"),
        ("dspark_sglang/cli/bad.py", "import sglang.srt", "only serving imports sglang"),
        ("dspark_sglang/serving/bad.py", "from dspark_sglang import cli", "nobody imports the c"),
        ("dspark_sglang/serving/bad.py", "import dspark_packaging.card", "serving imports no t"),
        ("dspark_sglang/serving/bad.py", "import dspark_sglang.training", "serving imports no t"),
        ("dspark_sglang/errors.py", "import dspark_sglang.serving.entry", "the foundation"),
        ("kernels/dspark_kernels/bad.py", "import numpy", "kernels import torch and triton"),
        ("kernels/dspark_kernels/bad.py", "import dspark_sglang.core", "kernels import torch"),
        ("packaging/dspark_packaging/bad.py", "import sglang", "only serving imports sglang"),
        ("loadtests/dspark_loadtests/bad.py", "import dspark_sglang.cli.main", "nobody imports"),
    ],
)
def test_a_wrong_import_is_noticed(tmp_path: Path, module: str, line: str, rule: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (broken,) = violations(tmp_path)
    assert rule in broken


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dspark_sglang/core/good.py", "import math, torch.nn, numpy.typing"),
        (
            "dspark_sglang/core/good.py",
            "from dspark_sglang.core.schedule.cost_model import StepCost",
        ),
        ("dspark_sglang/core/good.py", "from .cost import StepCost"),
        ("dspark_sglang/core/x/__init__.py", "from ..cost import StepCost"),
        ("dspark_sglang/layouts/good.py", "from dspark_sglang.core.heads import MarkovHead"),
        ("dspark_sglang/serving/good.py", "import dspark_sglang.layouts.v4"),
        ("dspark_sglang/serving/good.py", "import sglang.srt, dspark_kernels.accept"),
        ("dspark_sglang/cli/good.py", "from dspark_sglang.cli import other"),
        ("kernels/dspark_kernels/good.py", "import torch, triton.language"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("dspark_sglang/config.py", "os.environ['DSPARK_SEED']", True),
        ("dspark_sglang/targets.py", "child = {**os.environ, 'A': '1'}", True),
        ("dspark_sglang/targets.py", "child = os.environ | {'A': '1'}", True),
        ("dspark_sglang/targets.py", "child = os.environ.copy()", True),
        ("dspark_sglang/targets.py", "os.environ.get('HF_HOME')", False),
        ("dspark_sglang/targets.py", "os.getenv('HF_HOME')", False),
        ("dspark_sglang/targets.py", "from os import environ", False),
        ("dspark_sglang/targets.py", "for name in os.environ: pass", False),
        ("dspark_sglang/serving/entry.py", "os.environ.get('SGLANG_PLATFORM')", True),
        ("dspark_sglang/serving/entry.py", "os.environ.get('DSPARK_PLUGIN')", False),
        ("dspark_sglang/serving/arguments.py", "N = 'SGLANG_X'\nos.environ[N] = '1'", True),
        ("dspark_sglang/serving/arguments.py", "N = 'CUDA_X'\nos.environ[N] = '1'", False),
        ("dspark_sglang/serving/worker.py", "os.environ.get('SGLANG_PLATFORM')", False),
    ],
)
def test_the_environment_check(tmp_path: Path, module: str, line: str, allowed: bool) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text("import os\n" + line + "\n")
    assert (environment_reads(tmp_path) == []) == allowed


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, dspark_sglang.cli.app; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
