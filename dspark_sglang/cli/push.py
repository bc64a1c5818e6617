"""``dspark push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A package or a bundle.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it. Default: private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch. Default: main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with dspark push",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify and list; contact nobody.")
    ] = False,
) -> None:
    """Verify a package, then send it to the Hub. An interrupted push goes on when run again.

    The token is the one of `hf auth login` or HF_TOKEN; it is never an option and never printed.
    """
    from dspark_packaging.push import check_repo_id, commands, groups, items
    from dspark_packaging.push import push as send
    from dspark_packaging.transfer import shown
    from dspark_packaging.verify import verify_any
    from dspark_sglang.cli.package import summary

    check_repo_id(repo_id)
    typer.echo(summary("Verified", directory, verify_any(directory, progress=shown)))
    files = items(directory)
    total = sum(item.size for item in files)
    parts = len(groups(files))
    typer.echo(
        f"{len(files)} files, {total / 1e6:,.1f} MB, {parts} commit{'s' if parts > 1 else ''} to "
        f"{repo_id} ({'public' if public else 'private'})."
    )
    typer.echo("By hand:")
    for line in commands(directory, repo_id, private=not public, revision=revision):
        typer.echo(f"  {line}")
    if dry_run:
        for item in files:
            typer.echo(f"  {item.size:>15,}  {item.name}")
        typer.echo("Dry run: nothing was sent.")
        return
    done = send(directory, repo_id, private=not public, revision=revision, message=message)
    typer.echo(f"Pushed and compared: {done.url}, revision {done.revision}.")
