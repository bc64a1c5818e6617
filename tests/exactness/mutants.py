"""Deliberately wrong acceptance, one per option: each must be rejected by the test of its option.

A proof that cannot fail proves nothing. A mutant reaches a server only through a ``sitecustomize.py``
that :func:`prepare` writes into a run's folder, put on that one server's ``PYTHONPATH``, and patches
modules right after they are imported there. Nothing large is imported up here: the
hook runs in every process of that server.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.patching import on_import

#: Chooses the mutant in the processes of a server. Not ``DSPARK_*``: those are settings.
VARIABLE = "EXACTNESS_MUTANT"
_SITE = f"""import os

from tests.exactness.mutants import install

install(os.environ["{VARIABLE}"])
"""
ACCEPT = "dspark_sglang.core.accept"
SAMPLING = "dspark_sglang.core.sampling"
PENALTIES = "dspark_sglang.core.penalties"
VERIFIER = "dspark_sglang.serving.verifier"
REQUESTS = "sglang.srt.managers.schedule_batch"

Make = Callable[[ModuleType, Callable[..., Any]], Callable[..., Any]]


def _correction_from_target(module: ModuleType, original: Callable[..., Any]) -> Any:
    """After a rejection the token comes from p, not from norm(max(0, p - q))."""

    def mutated(round_: Any, uniforms: Any) -> Any:
        found = original(round_, uniforms)
        row = round_.first + found.count
        return dataclasses.replace(found, token=module.sample(round_.weights[row], uniforms[:, -1]))

    return mutated


def _residual_against_masked_draft(module: ModuleType, original: Callable[..., Any]) -> Any:
    """The residual subtracts the drafted distribution renormalised over the tokens the grammar allows."""

    def mutated(round_: Any, uniforms: Any) -> Any:
        rows, _ = round_.target()
        weights = round_.weights[rows]
        if round_.support is not None:
            weights = weights.gather(-1, round_.support)
        masked = round_.probs * (weights > 0)
        masked = masked / masked.sum(-1, keepdim=True).clamp(min=1e-30)
        count = original(round_, uniforms).count
        scale = uniforms.new_ones(len(count))
        return module._finish(round_._replace(probs=masked), count, scale, uniforms[:, -1])

    return mutated


def _block_tested_by_survival(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Block verification that tests every prefix with w, as if it were the whole block."""

    def mutated(round_: Any, uniforms: Any) -> Any:
        survives = [uniforms.new_ones(len(uniforms))]
        for p, q in zip(*(chance.unbind(1) for chance in round_.chances()), strict=True):
            survives.append((survives[-1] * p / q.clamp(min=1e-30)).clamp(max=1.0))
        position = uniforms.new_tensor(range(1, len(survives)))
        weights = module.torch.stack(survives, dim=1)
        kept = (uniforms[:, :-1] < weights[:, 1:]) & (position <= round_.lens[:, None])
        count = (kept * position).max(dim=1).values.long()
        scale = weights.gather(1, count[:, None])[:, 0]
        return module._finish(round_, count, scale, uniforms[:, -1])

    return mutated


def _without(name: str) -> Make:
    """A filter is ignored in verification."""

    def make(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
        def mutated(logits: Any, temperature: Any, **filters: Any) -> Any:
            return original(logits, temperature, **{**filters, name: None})

        return mutated

    return make


def _top_p_drops_the_crossing_token(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Top-p keeps the tokens whose own mass stays within p, so not the one that crosses it."""

    def mutated(logits: Any, temperature: Any, **filters: Any) -> Any:
        top_p = filters.get("top_p")
        distribution = original(logits, temperature, **{**filters, "top_p": None})
        if top_p is None:
            return distribution
        ordered, index = distribution.sort(dim=-1, descending=True)
        drop = ordered.cumsum(-1) > top_p[:, None]
        drop[:, 0] = False
        return distribution.zero_().scatter_(-1, index, ordered.masked_fill(drop, 0.0))

    return mutated


def _filters_renormalise_in_turn(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Top-k, then top-p of what it left, then min-p of what that left."""

    def mutated(logits: Any, temperature: Any, **filters: Any) -> Any:
        distribution = original(logits, temperature)
        for name in ("top_k", "top_p", "min_p"):
            distribution = distribution / distribution.sum(-1, keepdim=True)
            if filters.get(name) is not None:
                distribution = original(
                    distribution.log(),
                    distribution.new_ones(len(distribution)),
                    **{name: filters[name]},
                )
        return distribution

    return mutated


def _penalties_frozen_at_the_anchor(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Every row of a block counts the output up to the anchor only."""

    def mutated(self: Any, logits: Any, terms: Any, owner: Any, place: Any, block: Any) -> None:
        original(self, logits, terms, owner, place.clamp(max=1), block)

    return mutated


def _penalties_ignored(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Verification drops penalties."""

    def mutated(self: Any, *args: Any) -> None:
        return None

    return mutated


def _penalties_one_row_late(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Every row of a block misses the drafted token right before it."""

    def mutated(self: Any, logits: Any, terms: Any, owner: Any, place: Any, block: Any) -> None:
        original(self, logits, terms, owner, (place - 1).clamp(min=1), block)

    return mutated


def _min_new_tokens_ignored(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Stop tokens can be drawn in verification at any length."""

    def mutated(self: Any, logits: Any, terms: Any, *args: Any) -> None:
        none = terms.min_new_tokens.new_zeros(len(terms.min_new_tokens))
        original(self, logits, terms._replace(min_new_tokens=none), *args)

    return mutated


class _Unbiased:
    """Sampling information without its logit bias."""

    def __init__(self, info: Any) -> None:
        self._info = info
        self.logit_bias = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._info, name)


def _logit_bias_ignored(module: ModuleType, original: Callable[..., Any]) -> Any:
    """Verification drops the logit bias."""

    def mutated(self: Any, logits: Any, lens: Any, info: Any) -> Any:
        return original(self, logits, lens, _Unbiased(info))

    return mutated


def _runs_not_cut_at_a_stop(module: ModuleType, original: Callable[..., Any]) -> Any:
    """What an accepted run holds after a stop is given out too."""

    def mutated(self: Any) -> Any:
        return self.output_ids[: self.sampling_params.max_new_tokens]

    return mutated


#: Mutant to module, attribute below it, and what makes the replacement.
MUTANTS: Mapping[str, tuple[str, str, Make]] = {
    "correction_from_target": (ACCEPT, "accept_sampled", _correction_from_target),
    "residual_against_masked_draft": (ACCEPT, "accept_sampled", _residual_against_masked_draft),
    "block_tested_by_survival": (ACCEPT, "accept_block", _block_tested_by_survival),
    "top_k_ignored": (SAMPLING, "target_weights", _without("top_k")),
    "min_p_ignored": (SAMPLING, "target_weights", _without("min_p")),
    "top_p_drops_the_crossing_token": (
        SAMPLING,
        "target_weights",
        _top_p_drops_the_crossing_token,
    ),
    "filters_renormalise_in_turn": (SAMPLING, "target_weights", _filters_renormalise_in_turn),
    "penalties_frozen_at_the_anchor": (
        PENALTIES,
        "OutputCounts.penalise",
        _penalties_frozen_at_the_anchor,
    ),
    "penalties_ignored": (PENALTIES, "OutputCounts.penalise", _penalties_ignored),
    "penalties_one_row_late": (PENALTIES, "OutputCounts.penalise", _penalties_one_row_late),
    "min_new_tokens_ignored": (PENALTIES, "OutputCounts.penalise", _min_new_tokens_ignored),
    "logit_bias_ignored": (VERIFIER, "Verifier._bias", _logit_bias_ignored),
    "runs_not_cut_at_a_stop": (
        REQUESTS,
        "Req.output_ids_through_stop",
        _runs_not_cut_at_a_stop,
    ),
}


def said(mutant: str) -> str:
    """The line a server's log has once a mutant has really run."""
    return f"mutant {mutant} ran"


def apply(mutant: str, module: ModuleType) -> None:
    """Replace the mutant's attribute in its module, which must be imported."""
    _, path, make = MUTANTS[mutant]
    *owners, name = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    found = getattr(owner, name)
    original: Any = found.fget if isinstance(found, property) else found
    replacement = make(module, original)
    told: list[bool] = []

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not told:
            told.append(True)
            print(said(mutant), file=sys.stderr, flush=True)
        return replacement(*args, **kwargs)

    setattr(owner, name, property(counted) if isinstance(found, property) else counted)


def install(mutant: str) -> None:
    """Patch the mutant's module when this process imports it."""
    on_import({MUTANTS[mutant][0]: functools.partial(apply, mutant)})


def prepare(mutant: str, folder: Path) -> dict[str, str]:
    """Write the hook into ``folder``; returns the environment of a server with the mutant."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
    given = os.environ.get("PYTHONPATH")
    root = Path(__file__).resolve().parents[2]
    paths = [str(folder.resolve()), *([given] if given else []), str(root)]
    return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: mutant}
