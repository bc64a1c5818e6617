"""SmolLM2's drafter: packaged, verified, pushed, downloaded elsewhere and served from the download."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dspark_packaging import artifact
from dspark_packaging.errors import PackageError
from dspark_packaging.smoke import ask
from dspark_packaging.verify import verify_any
from dspark_sglang.server import COMMON_FLAGS, Server, free_port
from tests.packaging.clients import CLIENTS, TOKEN, dspark, install, run
from tests.packaging.hub import FakeHub, running_hub
from tests.packaging.samples import tree

Say = Callable[[str], None]
REPO = "someone/smollm2-dspark"


class RoundTrip(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen on the way."""

    served: bool
    interrupted_push_resumed: bool
    private_by_default: bool
    public_repository_refused: bool
    token_never_printed: bool
    #: Client and release → whether the Hub held the same bytes afterwards.
    clients: dict[str, bool]
    text: str
    rounds: int


def published(folder: Path) -> dict[str, bytes]:
    """The files of a package, without what ``hf`` leaves in a download."""
    return {name: data for name, data in tree(folder).items() if not name.startswith(".cache/")}


def push_interrupted(hub: FakeHub, package: Path, home: Path, say: Say) -> tuple[bool, str]:
    """Push over a connection that breaks, then again; whether it was resumed, and all output."""
    say("push: the connection breaks in the middle of the weights")
    hub.drop_larger_than = 1 << 20
    first = run(dspark("push", str(package), REPO), hub, home)
    hub.drop_larger_than = None
    sent_before = set(hub.objects)
    say("push: again")
    mark = len(hub.requests)
    second = run(dspark("push", str(package), REPO), hub, home)
    mark_third = len(hub.requests)
    third = run(dspark("push", str(package), REPO), hub, home)
    uploads = [line for line in hub.requests[mark:mark_third] if line.startswith("PUT ")]
    repeated = [line for line in hub.requests[mark_third:] if line.startswith("PUT ")]
    again = [line for line in uploads if line.rsplit("/", 1)[1] in sent_before]
    resumed = (
        first.returncode == 2
        and hub.dropped > 0
        and second.returncode == 0
        and third.returncode == 0
        and not again
        and not repeated
        and hub.repos[REPO] == published(package)
    )
    output = "".join(done.stdout + done.stderr for done in (first, second, third))
    if not resumed:
        say(output.replace(TOKEN, "(token)"))
    return resumed, output


def upload_with_clients(
    hub: FakeHub, package: Path, work: Path, cache: Path, say: Say
) -> tuple[dict[str, bool], str]:
    """Upload and download with the clients of both lines."""
    same: dict[str, bool] = {}
    output = ""
    for client in CLIENTS:
        program = str(install(client, cache))
        say(f"{client.command} of huggingface_hub {client.release}")
        repo = f"someone/by-{client.command}"
        home = work / f"home-{client.release}"
        done = run([program, "upload", repo, str(package), ".", "--private"], hub, home)
        copy = work / f"copy-{client.release}"
        back = run([program, "download", repo, "--local-dir", str(copy)], hub, home)
        same[f"{client.command} {client.release}"] = (
            done.returncode == back.returncode == 0
            and hub.private[repo]
            and published(copy) == published(package) == hub.repos[repo]
        )
        text = done.stdout + done.stderr + back.stdout + back.stderr
        output += text
        if not same[f"{client.command} {client.release}"]:
            say(text.replace(TOKEN, "(token)"))
    return same, output


def serve(target: Path, drafter: Path, log: Path) -> tuple[str, dict[str, Any]]:
    """``sglang serve`` with a downloaded drafter: its text, and what the plugin says about itself.

    Raises:
        ServerError: it did not start or answer.
        PackageError: it served without speculation.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--model-path", str(target)]
    command += ["--port", str(port), "--dtype", "bfloat16", *COMMON_FLAGS]
    command += ["--speculative-algorithm", "DSPARK"]
    command += ["--speculative-draft-model-path", str(drafter)]
    environment = {"DSPARK_SCHEDULE": "all", "DSPARK_COST": "online"}
    with Server(command, port=port, log=log, environment=environment) as server:
        server.wait_ready()
        answer = ask(server.url)
        record = server.dspark()
    if record is None:
        raise PackageError(
            "The server ran without the plugin.",
            expected="DSPARK by dspark-sglang",
            fix="Check the installation with `dspark doctor`.",
        )
    return str(answer["text"]), record


def round_trip(source: Path, target: Path, work: Path, cache: Path, say: Say) -> RoundTrip:
    """The whole way.

    Args:
        source: a packaged drafter.
        target: its target.
        work: an empty folder.
        cache: where client environments are kept.
        say: told each step.

    Raises:
        DSparkError: a step failed.
    """
    package = work / "package"
    say("package and verify")
    artifact.build(source, package, artifact.Options(target=target))
    verify_any(package)
    with running_hub() as hub:
        home = work / "home"
        resumed, output = push_interrupted(hub, package, home, say)
        private = hub.private.get(REPO, False)
        hub.repos["someone/open"], hub.private["someone/open"] = {}, False
        public = run(dspark("push", str(package), "someone/open"), hub, home)
        refused = public.returncode == 2 and "is public" in public.stderr
        clients, more = upload_with_clients(hub, package, work, cache, say)
        copy = work / "elsewhere"
        program = str(install(CLIENTS[-1], cache))
        say("download elsewhere and verify")
        run([program, "download", REPO, "--local-dir", str(copy)], hub, work / "other")
        verify_any(copy)
        tokens_sent = f"Bearer {TOKEN}" in hub.tokens
    say("sglang serve from the download")
    text, record = serve(target, copy, work / "server.log")
    printed = output + more + public.stdout + public.stderr
    return RoundTrip(
        served=bool(text.strip()) and int(record["rounds"]) > 0,
        interrupted_push_resumed=resumed,
        private_by_default=private,
        public_repository_refused=refused,
        token_never_printed=tokens_sent and TOKEN not in printed,
        clients=clients,
        text=text.strip()[:80],
        rounds=int(record["rounds"]),
    )
