"""The committed artifact goes to the Hub and comes back unchanged, with the real client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_packaging.verify import verify_artifact
from tests.packaging.hub import FakeHub, running_hub
from tests.packaging.samples import COMMITTED

HF = Path(sys.executable).parent / "hf"
REPO = "someone/smollm2-135m-instruct-dspark"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as running:
        yield running


def hf(hub: FakeHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    kept = {k: v for k, v in kept.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_any",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [str(HF), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def test_upload_download_verify(hub: FakeHub, tmp_path: Path) -> None:
    sent = files_of(COMMITTED)

    upload = hf(hub, tmp_path / "home", "upload", REPO, str(COMMITTED), ".")
    assert upload.returncode == 0, upload.stderr
    assert "warning" not in upload.stderr.lower(), upload.stderr
    assert hub.repos[REPO] == sent
    assert len(hub.commits) == 1
    assert "POST /api/validate-yaml" in hub.requests
    assert sum(line.startswith("PUT /lfs/objects/") for line in hub.requests) == 1

    copy = tmp_path / "copy"
    download = hf(hub, tmp_path / "other", "download", REPO, "--local-dir", str(copy))
    assert download.returncode == 0, download.stderr
    assert files_of(copy) == sent
    # `hf download` leaves .cache/ there, which verification has to put up with.
    assert (copy / ".cache").is_dir()
    assert verify_artifact(copy).name == "smollm2-135m-instruct-dspark"


def test_by_hand_only_gitattributes_is_sent_of_what_tools_leave(
    hub: FakeHub, tmp_path: Path
) -> None:
    """The other half of what ``dspark verify`` lets lie in a folder never leaves it."""
    package = tmp_path / "package"
    shutil.copytree(COMMITTED, package, ignore=shutil.ignore_patterns("*.safetensors"))
    sent = files_of(package)
    (package / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for name in (".git/config", ".cache/huggingface/download/x.metadata"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("x\n")
    upload = hf(hub, tmp_path / "home", "upload", REPO, str(package), ".")
    assert upload.returncode == 0, upload.stderr
    assert hub.repos[REPO].keys() == sent.keys() | {".gitattributes"}


def test_second_upload_changes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    # Not the weights: this is about commits, and 30 MB are uploaded above.
    arguments = ("upload", REPO, str(COMMITTED), ".", "--exclude", "*.safetensors")
    for _ in range(2):
        done = hf(hub, tmp_path / "home", *arguments)
        assert done.returncode == 0, done.stderr
    assert len(hub.commits) == 1


def test_download_into_the_cache_verifies(hub: FakeHub, tmp_path: Path) -> None:
    # The cache holds symlinks to blobs: what a server gets from a repository id.
    hub.repos[REPO] = files_of(COMMITTED)
    download = hf(hub, tmp_path / "home", "download", REPO, "--quiet")
    assert download.returncode == 0, download.stderr
    snapshots = list((tmp_path / "home").glob("hub/models--*/snapshots/*"))
    assert len(snapshots) == 1
    assert (snapshots[0] / "model.safetensors").is_symlink()
    verify_artifact(snapshots[0])
