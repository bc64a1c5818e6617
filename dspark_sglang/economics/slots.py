"""What the drafter's memory costs: tokens of context, hence requests, that no longer fit."""

from __future__ import annotations

import msgspec

from dspark_sglang.errors import ConfigError
from dspark_sglang.planning import hardware
from dspark_sglang.planning import plan as planning
from dspark_sglang.planning.plan import LABEL

#: Ending of a published bundle's name; without it, the same target without the drafter.
_BUNDLE = "-dspark"


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one server that memory holds, from shapes alone.

    Attributes:
        context: tokens each of them has.
        requests, without_drafter: with and without the drafter.
        with_mtp: with the MTP layer that the drafter replaces instead; None where there is none. Its KV is
            taken to be to the drafter's as its weights are.
        ranks: GPUs of that server.
    """

    model: str
    hardware: str
    context: int
    ranks: int
    requests: int
    without_drafter: int
    with_mtp: int | None = None
    drafter_gib: float
    label: str = LABEL

    @property
    def lost(self) -> float:
        """Share of requests that the drafter's memory takes away."""
        return 1.0 - self.requests / self.without_drafter

    def baseline(self, name: str) -> int:
        """Requests of a baseline: with an MTP layer where its name says so, else with no drafter."""
        return self.with_mtp if self.with_mtp and "mtp" in name.lower() else self.without_drafter


def count(target: str, drafter: str | None, machine: str, context: int) -> Slots:
    """Count them.

    Args:
        target: as in ``dspark plan``; a bundle has to be a published one ("...-dspark").
        drafter: a stand-alone one; None: the one bundled.
        machine: as in ``dspark plan --hardware``.
        context: tokens of a request, prompt and answer.

    Raises:
        DSparkError: unknown model or hardware, no drafter, or nothing fits.
    """
    if drafter is None and not target.endswith(_BUNDLE):
        raise ConfigError(
            f"{target} bundles no drafter that is known here.",
            expected=f"a published name that ends in {_BUNDLE}, or a drafter beside the target",
            fix="Pass --drafter, or leave --model out.",
        )
    if context < 1:
        raise ConfigError(f"--context is {context}.", expected="at least 1", fix="Change it.")
    profile = hardware.read(machine)
    ours = planning.make(target, drafter, profile)
    bare = planning.make(target.removesuffix(_BUNDLE), None, profile)
    if not ours.fits or ours.tokens < context:
        raise ConfigError(
            f"{target} leaves room for {max(0, ours.tokens)} tokens of context on {machine}.",
            expected=f"at least one request of {context}",
            fix=f"See `dspark plan {target} --hardware {machine}`.",
        )
    cost = ours.drafter_bytes
    requests, without = ours.tokens // context, bare.tokens // context
    replaced = cost.mtp_layer / cost.gross if cost else 0.0
    return Slots(
        model=target,
        hardware=machine,
        context=context,
        ranks=ours.tp,
        requests=requests,
        without_drafter=without,
        with_mtp=round(without - (without - requests) * replaced) if replaced else None,
        drafter_gib=(cost.gross if cost else 0) / 2**30,
    )
