"""What an installed SGLang understands, read from its source: importing it takes seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

#: How many values a flag takes: none, exactly one, at least one, or whatever is given.
Arity = Literal["none", "one", "some", "any"]
_ENVIRONMENT = re.compile(r"\bSGLANG_[A-Z0-9_]+\b")


def sglang_flags(package: Path) -> dict[str, Arity]:
    """Every command-line flag of the SGLang below ``package`` and how many values it takes."""
    flags: dict[str, Arity] = {}
    for path in sorted((package / "srt/arg_groups/fields").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flags |= _field_flags(node.target.id, node.annotation)
    server_args = (package / "srt/server_args.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(server_args)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            arity: Arity = "any" if any(k.arg == "action" for k in node.keywords) else "one"
            flags |= {name: arity for name in _strings(node.args) if name.startswith("--")}
    return flags


def sglang_environment(package: Path) -> frozenset[str]:
    """The ``SGLANG_*`` variables that the SGLang below ``package`` reads."""
    files = ("srt/environ.py", "srt/entrypoints/http_server.py")
    return frozenset(
        name
        for file in files
        for name in _ENVIRONMENT.findall((package / file).read_text(encoding="utf-8"))
    )


def _strings(nodes: Sequence[ast.expr]) -> list[str]:
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _field_flags(name: str, annotation: ast.expr) -> dict[str, Arity]:
    """The flags of one ``name: A[type, help-or-Arg(...)]`` declaration."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return {}
    kind, *rest = annotation.slice.elts  # type: ignore[attr-defined]
    metadata = [n for n in rest if isinstance(n, ast.Call) and ast.unparse(n.func) == "Arg"]
    given = {k.arg: k.value for call in metadata for k in call.keywords}
    if "no_cli" in given:
        return {}
    names = _strings([given["cli_name"]]) if "cli_name" in given else []
    names = names or ["--" + name.replace("_", "-")]
    names += _strings(getattr(given.get("aliases"), "elts", []))
    plain = re.sub(r"^Optional\[(.*)\]$|^(.*) \| None$", r"\1\2", ast.unparse(kind))
    arity: Arity = "one"
    if "action" in given:
        arity = "any"
        names += ["--no-" + n[2:] for n in names if "Boolean" in ast.unparse(given["action"])]
    elif "nargs" in given:
        arity = "some" if _strings([given["nargs"]]) == ["+"] else "any"
    elif plain == "bool":
        arity = "none"
    elif plain.startswith(("List[", "list[")) and "type_parser" not in given:
        arity = "some"
    return dict.fromkeys(names, arity)
