"""Send a verified package to the Hub: private by default, resumed where it was interrupted.

Uses ``huggingface_hub``, as ``hf upload`` does, in commits of bounded size: what is committed, and
every weight file that arrived, is not sent again. The card and the checksums go last, so that a
half-sent package cannot be taken for a whole one.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dspark_packaging import hub_rules
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import CARD_FILE, MANIFEST_FILE, SIGNATURE_FILE, package_files
from dspark_packaging.manifest import read_manifest

#: Bytes of weights a commit.
GROUP_BYTES = 50 * 10**9
_LAST = (SIGNATURE_FILE, MANIFEST_FILE, CARD_FILE)
_SECRET = re.compile(r"hf_[A-Za-z0-9]{2,}|(?i:bearer)\s+\S+|(?<=://)[^/\s:@]+:[^/\s@]+@")
_HIDDEN = "(token hidden)"


class Item(NamedTuple):
    """One file to send."""

    name: str
    size: int


class Pushed(msgspec.Struct, frozen=True, kw_only=True):
    """What the Hub holds now."""

    url: str
    #: Head of the branch, to pin.
    revision: str
    commits: int
    files: int


def items(directory: Path) -> list[Item]:
    """The files of a package, weights first, those that declare it whole last.

    Raises:
        PackageError: the folder holds what no package has.
    """
    found = [
        Item(path.relative_to(directory).as_posix(), path.stat().st_size)
        for path in package_files(directory)
    ]

    def order(item: Item) -> tuple[int, str]:
        return (_LAST.index(item.name) + 1 if item.name in _LAST else 0, item.name)

    return sorted(found, key=order)


def groups(files: Iterable[Item], limit: int = GROUP_BYTES) -> list[list[Item]]:
    """Consecutive files of at most ``limit`` bytes together (a larger one alone)."""
    made: list[list[Item]] = [[]]
    for item in files:
        if made[-1] and sum(other.size for other in made[-1]) + item.size > limit:
            made.append([])
        made[-1].append(item)
    return [group for group in made if group]


def commands(directory: Path, repo_id: str, *, private: bool, revision: str | None) -> list[str]:
    """The same by hand, with the client of either line."""
    words = f"upload {repo_id} {directory} ." + (" --private" if private else "")
    words += f" --revision {revision}" if revision else ""
    return [
        f"hf {words}",
        f"huggingface-cli {words}   # huggingface_hub before 1.0",
    ]


def scrub(text: str, token: str | None = None) -> str:
    """``text`` without anything that looks like a token."""
    if token:
        text = text.replace(token, _HIDDEN)
    return _SECRET.sub(_HIDDEN, text)


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse.

    Raises:
        PackageError: not ``owner/name``.
    """
    if not hub_rules.is_repo_id(repo_id):
        raise PackageError(
            f"{scrub(repo_id)!r} is no name for a model on the Hub.",
            expected="OWNER/NAME",
            fix="Name your account or organisation and the model, such as me/my-dspark.",
        )


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload with dspark push",
    group_bytes: int = GROUP_BYTES,
) -> Pushed:
    """Send a package that was verified.

    Args:
        directory: the package.
        repo_id: ``owner/name``; made when it does not exist.
        private: whether only the owner may see it.
        revision: branch; None for the main one.
        message: of the commits.
        group_bytes: weights a commit.

    Raises:
        PackageError: no token, no access, a public repository where a private one was asked for,
            an interrupted transfer (run again), or a Hub that holds something else afterwards.
    """
    check_repo_id(repo_id)
    token = get_token()
    if token is None:
        raise PackageError(
            "There is no token for the Hub.",
            expected="one that may write",
            fix="Run `hf auth login`, or set HF_TOKEN.",
        )
    problem = ""
    try:
        return _push(directory, repo_id, private, revision, message, group_bytes)
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        problem = scrub(" ".join(str(error).split()), token)[:400] or type(error).__name__
    except RuntimeError as error:  # the client wraps a failed transfer of a large file in one
        cause = error.__cause__ or error
        problem = scrub(" ".join(f"{error} {cause}".split()), token)[:400]
    # Outside the handler, so that no traceback carries the client's own.
    raise PackageError(
        f"Pushing to {repo_id} failed: {problem}.",
        expected="the whole package on the Hub",
        fix="Run the same command again: files that arrived are not sent again.",
    )


def _push(
    directory: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str,
    group_bytes: int,
) -> Pushed:
    api = HfApi(library_name="dspark-sglang")
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and api.repo_info(repo_id).private is False:
        raise PackageError(
            f"{repo_id} exists and is public.",
            expected="a private repository (the default)",
            fix="Pass --public if everybody may see this package, or choose another name.",
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = items(directory)
    parts = groups(files, group_bytes)
    for number, part in enumerate(parts, start=1):
        note = f"{message} ({number} of {len(parts)})" if len(parts) > 1 else message
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=[glob.escape(item.name) for item in part],
            commit_message=note,
            revision=revision,
        )
    _compare(api, directory, repo_id, revision, files)
    head = api.repo_info(repo_id, revision=revision).sha
    return Pushed(
        url=f"{api.endpoint}/{repo_id}",
        revision=str(head),
        commits=len(parts),
        files=len(files),
    )


def _compare(
    api: HfApi, directory: Path, repo_id: str, revision: str | None, files: list[Item]
) -> None:
    """The Hub has every file, of the right size, and large ones with the digest of the manifest."""
    manifest = read_manifest(directory).files
    held = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
    }
    for item in files:
        there = held.get(item.name)
        size = getattr(there, "size", None)
        lfs = getattr(there, "lfs", None)
        digest = getattr(lfs, "sha256", None)
        wanted = manifest.get(item.name)
        if size != item.size or (digest and wanted and digest != wanted.sha256):
            raise PackageError(
                f"{repo_id} holds {item.name} with {size} bytes (SHA-256 {str(digest)[:16]}).",
                expected=f"{item.size} bytes, as in {directory}",
                fix="Run the same command again.",
            )
