"""RDMA devices that NCCL should use, found in ``/sys/class/infiniband``.

A RoCE device lists many addresses (GIDs); traffic crosses routers only by RoCE v2 over a routable one, and which
index that is differs from node to node. NCCL's own default picks index 0 or what a manifest hard-codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from dspark_sglang.errors import ConfigError

SYSFS = Path("/sys/class/infiniband")
_ROCE_V2 = "RoCE v2"
_MAPPED_IPV4 = "0000:0000:0000:0000:0000:ffff:"
_LINK_LOCAL = "fe80:"


class Port(msgspec.Struct, frozen=True):
    """One active port."""

    device: str
    number: int
    ethernet: bool
    #: Of the GID to use; None on InfiniBand, which needs none.
    gid_index: int | None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""  # an unset GID entry cannot be read


def _gid_index(port: Path) -> int | None:
    """The first RoCE v2 GID: an IPv4 address before a global IPv6 one, never link-local."""
    found: list[tuple[bool, int]] = []
    for kind in (port / "gid_attrs/types").glob("*"):
        gid = _read(port / "gids" / kind.name)
        if _read(kind) != _ROCE_V2 or not gid.strip("0:") or gid.startswith(_LINK_LOCAL):
            continue
        found.append((not gid.startswith(_MAPPED_IPV4), int(kind.name)))
    return min(found)[1] if found else None


def _ports(root: Path) -> Iterator[Port]:
    for port in sorted(root.glob("*/ports/*")):
        if "ACTIVE" not in _read(port / "state"):
            continue
        ethernet = _read(port / "link_layer") == "Ethernet"
        index = _gid_index(port) if ethernet else None
        if not ethernet or index is not None:
            yield Port(port.parent.parent.name, int(port.name), ethernet, index)


def environment(root: Path = SYSFS) -> dict[str, str]:
    """NCCL's variables for the active ports.

    Raises:
        ConfigError: no usable port, or ports that need different GID indices, of which NCCL takes one.
    """
    ports = list(_ports(root))
    if not ports:
        raise ConfigError(
            f"{root} shows no active port with a routable RoCE v2 or InfiniBand address.",
            expected="an RDMA device in this container",
            fix="Check the device plugin's resource (deploy/components/rdma), or serve without --rdma.",
        )
    names = {"NCCL_IB_HCA": "=" + ",".join(f"{port.device}:{port.number}" for port in ports)}
    indices = {port.gid_index for port in ports if port.ethernet}
    if len(indices) > 1:
        listed = ", ".join(f"{port.device} {port.gid_index}" for port in ports)
        raise ConfigError(
            f"RDMA devices have their RoCE v2 address at different GID indices ({listed}).",
            expected="one index",
            fix="Set NCCL_IB_HCA and NCCL_IB_GID_INDEX yourself and serve without --rdma.",
        )
    if indices:
        names["NCCL_IB_GID_INDEX"] = str(indices.pop())
    return names
