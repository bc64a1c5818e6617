"""``dspark push`` against a local stand-in for the Hub, with the installed client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_packaging.errors import PackageError
from dspark_packaging.push import Item, check_repo_id, commands, groups, items, scrub
from tests.packaging.clients import TOKEN, dspark, run
from tests.packaging.hub import FakeHub, running_hub
from tests.packaging.samples import tree, write_package

pytestmark = pytest.mark.costly
REPO = "someone/tiny-dspark"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as running:
        yield running


def test_push_is_private_compared_and_not_repeated(
    hub: FakeHub, packed: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    first = run(dspark("push", str(packed), REPO), hub, home)
    assert first.returncode == 0, first.stderr
    assert hub.private[REPO]
    assert hub.repos[REPO] == tree(packed)
    assert f"revision {hub.sha()}" in first.stdout
    assert f"hf upload {REPO} {packed} . --private" in first.stdout
    commits, mark = len(hub.commits), len(hub.requests)
    again = run(dspark("push", str(packed), REPO), hub, home)
    assert again.returncode == 0, again.stderr
    assert len(hub.commits) == commits
    assert [line for line in hub.requests[mark:] if line.startswith("PUT")] == []
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in first.stdout + first.stderr + again.stdout + again.stderr


def test_push_refuses_a_public_repository_unless_told(
    hub: FakeHub, packed: Path, tmp_path: Path
) -> None:
    hub.repos[REPO], hub.private[REPO] = {}, False
    refused = run(dspark("push", str(packed), REPO), hub, tmp_path / "home")
    assert refused.returncode == 2
    assert "exists and is public" in refused.stderr
    assert hub.commits == []
    told = run(dspark("push", str(packed), REPO, "--public"), hub, tmp_path / "home")
    assert told.returncode == 0, told.stderr


def test_dry_run_contacts_nobody(hub: FakeHub, packed: Path, tmp_path: Path) -> None:
    done = run(dspark("push", str(packed), REPO, "--dry-run"), hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "nothing was sent" in done.stdout
    assert hub.requests == []


def test_what_does_not_verify_is_not_sent(hub: FakeHub, packed: Path, tmp_path: Path) -> None:
    (packed / "config.json").write_text("{}")
    done = run(dspark("push", str(packed), REPO), hub, tmp_path / "home")
    assert done.returncode == 2
    assert "dspark: error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.requests == []


def plant(package: Path) -> None:
    """What people have in such folders: a secret, a link to one elsewhere, weights by another name."""
    outside = package.parent / "credentials"
    outside.write_text("machine example.org password p\n")
    (package / ".env").write_text("KEY=secret\n")
    (package / ".netrc").symlink_to(outside)
    (package / ".evil.bin").write_bytes(b"\x80")


def leave(package: Path) -> None:
    """What git and ``hf`` leave."""
    (package / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    for name in (".git/config", ".cache/huggingface/download/config.json.metadata"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("x\n")


def push_extra_files(root: Path) -> int:
    """Files that reach the Hub and are not the package's: with entries planted, then with what tools leave."""
    package = write_package(root / "package")
    wanted = set(tree(package))
    with running_hub() as hub:
        plant(package)
        run(dspark("push", str(package), REPO), hub, root / "home")
        for name in (".env", ".netrc", ".evil.bin"):
            (package / name).unlink()
        leave(package)
        run(dspark("push", str(package), "someone/other"), hub, root / "home")
        extra = [name for files in hub.repos.values() for name in files.keys() - wanted]
        missing = wanted - hub.repos["someone/other"].keys()
    assert not missing, missing
    return len(extra)


def test_nothing_beyond_the_package_is_sent(tmp_path: Path) -> None:
    assert push_extra_files(tmp_path) == 0


def test_other_dot_entries_are_named_and_refused(
    hub: FakeHub, packed: Path, tmp_path: Path
) -> None:
    plant(packed)
    done = run(dspark("push", str(packed), REPO), hub, tmp_path / "home")
    assert done.returncode == 2
    assert "holds .env, .evil.bin, .netrc" in done.stderr
    assert "Move .env, .evil.bin, .netrc out of the folder" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["vocab.txt", ".gitattributes", ".eval_results/accepted-length.yaml"]
)
def test_links_out_of_the_folder_are_refused(packed: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("secret\n")
    (packed / name).parent.mkdir(exist_ok=True)
    (packed / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="is a link to"):
        items(packed)


def test_an_unreachable_hub_is_one_line(hub: FakeHub, packed: Path, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = run(dspark("push", str(packed), REPO), hub, tmp_path / "home")
    assert done.returncode == 2
    assert "Run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_weights_go_first_and_the_card_last(packed: Path) -> None:
    (packed / ".cache").mkdir()
    (packed / ".cache" / "x").write_text("")
    names = [item.name for item in items(packed)]
    assert names[-2:] == ["checksums.json", "README.md"]
    assert not [name for name in names if name.startswith(".cache")]


def test_commits_are_bounded() -> None:
    files = [Item("a", 30), Item("b", 30), Item("c", 70), Item("d", 5)]
    assert [[i.name for i in group] for group in groups(files, 60)] == [["a", "b"], ["c"], ["d"]]
    assert groups([], 60) == []


@pytest.mark.parametrize("name", ["name", "a/b/c", "a/..", "hf_abcdefghijk", "a/b.git"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(PackageError, match="OWNER/NAME") as caught:
        check_repo_id(name)
    assert "hf_abcdefghijk" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["token hf_Ab12cdEF", "Authorization: Bearer abc.def", "http://user:secret@host/x"]
)
def test_tokens_are_hidden(text: str) -> None:
    hidden = scrub(text)
    for secret in ("hf_Ab12cdEF", "abc.def", "secret"):
        assert secret not in hidden
    assert "odd-token" not in scrub("with odd-token in it", "odd-token")


def test_both_clients_are_named() -> None:
    lines = commands(Path("out"), REPO, private=True, revision="v1")
    assert lines[0] == f"hf upload {REPO} out . --private --revision v1"
    assert lines[1].startswith("huggingface-cli upload")
