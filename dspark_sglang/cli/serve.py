"""``dspark serve``: checks, then SGLang's server in this very process."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dspark_sglang.errors import ConfigError

#: The flags of a plan that are about memory and ranks; SGLang's own command line wins over them.
_MODEL, _DRAFTER = "--model-path", "--speculative-draft-model-path"


def serve(
    context: typer.Context,
    hardware: Annotated[
        str, typer.Option(help="Plan for this machine first (as `dspark plan` takes it), and add its "
                               "flags where none is given.")
    ] = "",
    rdma: Annotated[bool, typer.Option("--rdma", help="Tell NCCL the active RDMA devices.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, start nothing.")] = False,
) -> None:  # fmt: skip
    """Check that DSpark would really run, then start SGLang with the flags that follow.

    Refused: settings that are wrong, a plugin that SGLang would skip, a drafter that does not fit its target,
    a plan that does not fit. Process and signals are SGLang's own from then on.
    """
    from dspark_sglang import rdma as devices

    given = list(context.args)
    values = _values(given)
    _check(values)
    inherited = dict(os.environ)
    environment = inherited
    if hardware:
        words, more = _planned(values, hardware)
        given += [w for flag, *value in words if flag not in values for w in (flag, *value)]
        environment = {**more, **environment}
    if rdma:
        environment = {**devices.environment(), **environment}
    command = [sys.executable, "-m", "sglang.launch_server", *given]
    if dry_run:
        added = {k: v for k, v in environment.items() if k not in inherited}
        shown = [*(f"{k}={v}" for k, v in added.items()), "python", *command[1:]]
        print(shlex.join(shown))
        return
    os.execve(command[0], command, environment)


def _values(words: list[str]) -> dict[str, str]:
    """Flags and their first value."""
    found, name = {}, ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value
        elif name and not found[name]:
            found[name] = word
    return found


def _check(values: dict[str, str]) -> None:
    """Raise where SGLang would start and not run what was asked for.

    Raises:
        DSparkError: with the fix.
    """
    from dspark_sglang import diagnosis
    from dspark_sglang.layouts.base import bundle_at

    if values.get("--speculative-algorithm", "").upper() != "DSPARK":
        raise ConfigError(
            "--speculative-algorithm DSPARK is missing.",
            expected="a server with DSPARK",
            fix="Add it, or start a server without speculation by `sglang serve`.",
        )
    findings = diagnosis.activation()
    target = Path(values.get(_MODEL, ""))
    drafter = Path(values[_DRAFTER]) if values.get(_DRAFTER) else bundle_at(target)
    if drafter is not None and drafter.is_dir():
        findings += diagnosis.models(target if target.is_dir() else None, drafter)
    for finding in findings:
        if finding.level == "problem":
            raise ConfigError(finding.what + ".", expected="a server that drafts", fix=finding.fix)


def _planned(values: dict[str, str], hardware: str) -> tuple[list[list[str]], dict[str, str]]:
    """The plan's flags, each with its values, and its environment."""
    from dspark_sglang.planning import hardware as machines
    from dspark_sglang.planning import plan
    from dspark_sglang.planning.command import split

    if _MODEL not in values:
        raise ConfigError(
            f"{_MODEL} is missing.", expected="a target to plan for", fix="Name the target."
        )
    drafter = values.get(_DRAFTER)
    own = drafter if drafter and drafter != values[_MODEL] else None
    made = plan.make(values[_MODEL], own, machines.read(hardware))
    if not made.fits or made.refused:
        raise ConfigError(
            f"{values[_MODEL]} does not fit on {hardware}.",
            expected="a plan that fits",
            fix=f"See `dspark plan {values[_MODEL]} --hardware {hardware}`.",
        )
    planned = split(made.command, hardware)
    flags: list[list[str]] = []
    for word in planned.flags:
        if word.startswith("--"):
            flags.append([word])
        else:
            flags[-1].append(word)
    return flags, planned.environment
