"""Write ``docs/results/structure.json``: how large the code is, and how far one has to walk through it.

``python -m tests.structure`` measures the checkout that it lies in. ``--root DIR`` measures another one, such as a
worktree of an older commit.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import structure_package

ROOT = Path(__file__).resolve().parents[1]
#: Folders of source, and where their packages lie.
SOURCES = ("dspark_sglang", "kernels", "packaging", "loadtests")
PACKAGES = {
    "dspark_sglang": "dspark_sglang",
    "dspark_kernels": "kernels/dspark_kernels",
    "dspark_packaging": "packaging/dspark_packaging",
    "dspark_loadtests": "loadtests/dspark_loadtests",
}
WORKER = "dspark_sglang.serving.worker"


def source_lines(root: Path) -> int:
    """Lines of every Python file of the source."""
    files = (path for top in SOURCES for path in (root / top).rglob("*.py"))
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def serving_files(root: Path) -> int:
    """Python files of ``serving`` outside ``ops`` and ``cpu``."""
    return len(list((root / "dspark_sglang" / "serving").glob("*.py")))


def modules(root: Path) -> dict[str, Path]:
    """Name to file of every module of the source."""
    found: dict[str, Path] = {}
    for package, folder in PACKAGES.items():
        base = root / folder
        for path in base.rglob("*.py"):
            parts = [package, *path.relative_to(base).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the source that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in known)


def reached(known: dict[str, Path], start: str = WORKER) -> set[str]:
    """Modules that the imports of one reach, itself among them; imports in functions count."""
    found, waiting = {start}, [start]
    while waiting:
        for name in imported(known[waiting.pop()], known):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def closure(root: Path) -> dict[str, int]:
    """Files and lines that the worker's imports reach."""
    known = modules(root)
    texts = [known[name].read_text(encoding="utf-8") for name in reached(known)]
    full = [text for text in texts if text.strip()]
    return {"files": len(full), "lines": sum(len(text.splitlines()) for text in full)}


def any_share(root: Path) -> float:
    """Of the annotated parameters of ``serving``, the share that says ``Any`` and nothing else."""
    given = []
    for path in (root / "dspark_sglang" / "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                args = node.args
                every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
                given += [ast.unparse(arg.annotation) for arg in every if arg.annotation]
    return round(given.count("Any") / len(given), 4)


def commands(root: Path) -> int:
    """Commands that can be run, those of groups among them and hidden ones not."""
    code = (
        "from dspark_sglang.cli.main import app; import typer\n"
        "def count(one):\n"
        "    below = [c for c in getattr(one, 'commands', {}).values() if not c.hidden]\n"
        "    return sum(map(count, below)) + (not below or one.invoke_without_command)\n"
        "group = typer.main.get_command(app)\n"
        "print(sum(count(c) for c in group.commands.values() if not c.hidden))"
    )
    paths = [str(root / folder) for folder in ("", "kernels", "packaging", "loadtests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


def sentences(text: str) -> list[int]:
    """Words of every sentence of a page, its code, tables and links' targets left out."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.S)
    lines = ["" if re.match(r"\s*(\||#|!\[)", line) else line for line in text.splitlines()]
    found = []
    for block in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.)\s+", "\n".join(lines)):
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", block))
        for sentence in re.split(r"[.:?!](?:\s|$)", plain.replace("\n", " ")):
            words = re.findall(r"[\w'’-]+", sentence)
            if words:
                found.append(len(words))
    return found


def pages(root: Path) -> list[Path]:
    """README, quickstart and guides, as far as they are there."""
    docs = root / "docs"
    every = [root / "README.md", docs / "quickstart.md", *sorted((docs / "guides").glob("*.md"))]
    return [path for path in every if path.is_file()]


def measure(root: Path) -> dict[str, Any]:
    """Every figure of a checkout."""
    words = [n for path in pages(root) for n in sentences(path.read_text(encoding="utf-8"))]
    return {
        "source_lines": source_lines(root),
        "serving_files": serving_files(root),
        "worker_closure": closure(root),
        "any_share": any_share(root),
        "commands": commands(root),
        "readme_lines": len((root / "README.md").read_text(encoding="utf-8").splitlines()),
        "sentence_words": {"median": statistics.median(words), "max": max(words)},
    }


def main() -> None:
    """Measure and write, or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--golden",
        type=Path,
        help="what `python -m tests.golden.record --check --json` has written",
    )
    parser.add_argument("--root", type=Path, help="another checkout: print its figures only")
    given = parser.parse_args()
    found = measure(given.root or ROOT)
    if given.root is None:
        with tempfile.TemporaryDirectory() as folder:
            passed = structure_package.modules_of_the_source_path(Path(folder))
        found["modules_on_the_way"] = {"package": len(passed)}
    if given.golden is not None:
        found["golden_traces"] = json.loads(given.golden.read_text(encoding="utf-8"))
    text = json.dumps(found, indent=1) + "\n"
    if given.root is None:
        (ROOT / "docs" / "results" / "structure.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
