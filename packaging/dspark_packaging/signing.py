"""An OpenSSF model signature over a package (``model.sig``), with a key pair.

The format and the checks are those of the ``model-signing`` library (https://github.com/sigstore/
model-transparency), so ``model_signing verify key`` checks the same file.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import LEFT, SIGNATURE_FILE

_INSTALL = 'pip install "dspark-sglang[sign]"'
#: Relative to the folder, as the library wants.
_IGNORED = (SIGNATURE_FILE, *LEFT)


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise PackageError(
            f"Signatures need a library that is not installed ({error}).",
            expected="model-signing and pyOpenSSL",
            fix=f"Install them with `{_INSTALL}`.",
        ) from error
    return hashing, signing, verifying


def _require_key(path: Path, what: str) -> None:
    if not path.is_file():
        raise PackageError(
            f"{path} does not exist.",
            expected=f"a {what} key in PEM",
            fix="Make a pair with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` "
            "and `openssl ec -in key.pem -pubout -out key.pub`.",
        )


def sign(directory: Path, private_key: Path) -> Path:
    """Sign everything in ``directory``; returns the signature file.

    Raises:
        PackageError: no key, an unusable key, or the library is missing.
    """
    hashing, signing, _ = _library()
    _require_key(private_key, "private")
    signature = directory / SIGNATURE_FILE
    config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    try:
        config.set_hashing_config(
            hashing.Config().set_ignored_paths(paths=_IGNORED, ignore_git_paths=True)
        ).sign(directory, signature)
    except (ValueError, TypeError, OSError) as error:
        raise PackageError(
            f"{directory} could not be signed: {error}.",
            expected="an elliptic curve key and a readable folder",
            fix="Use a prime256v1, secp384r1 or secp521r1 key.",
        ) from error
    return signature


def verify_signature(directory: Path, public_key: Path) -> None:
    """Check ``model.sig`` against every file of the folder.

    Raises:
        PackageError: no signature, another key, or any file that is not what was signed.
    """
    hashing, _, verifying = _library()
    _require_key(public_key, "public")
    signature = directory / SIGNATURE_FILE
    if not signature.is_file():
        raise PackageError(
            f"{directory} has no {SIGNATURE_FILE}.",
            expected="a signed package",
            fix="Sign it with `dspark package DIR DIR --sign KEY`, or leave --public-key out.",
        )
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(
            hashing.Config()
            .set_ignored_paths(paths=_IGNORED, ignore_git_paths=True)
            .set_allow_symlinks(True)
        ).verify(directory, signature)
    except Exception as error:
        changed = re.findall(r"mismatch for \\?'([^'\\]+)", str(error))
        words = f"{', '.join(changed)} changed" if changed else " ".join(str(error).split())[:200]
        reason = words or type(error).__name__
        raise PackageError(
            f"{signature} does not hold: {reason}.",
            expected="the files that the owner of the key signed",
            fix="Download the package again from its owner; do not serve this copy.",
        ) from error
