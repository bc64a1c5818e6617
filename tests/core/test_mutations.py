"""The proofs can fail: small wrong changes to ``core/`` are each caught by one of them.

Every mutation is made in the source text, the module executed anew, and the functions a check uses
replaced by the mutated ones; the unchanged source must pass the same check.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from tests.core import test_enumeration, test_seeded
from tests.schedule import test_schedule


class Mutation(NamedTuple):
    """One wrong change, and the tests that must notice."""

    module: str
    before: str
    after: str
    #: Names in the test module that stand for the mutated functions.
    names: tuple[str, ...]
    tests: types.ModuleType
    check: Callable[[], object]


def rounds(method: str) -> Callable[[], None]:
    def check() -> None:
        accept = getattr(test_enumeration, f"accept_{method}")
        for seed in range(3):
            models, _ = test_enumeration.pair(seed, 3, 2)
            assert test_enumeration.worst(models, accept, test_enumeration.fixed(4)) < 1e-12

    return check


def greedy_rounds() -> None:
    models, _ = test_enumeration.pair(2, 3, 2)
    sharp = (test_enumeration.sharpened(models[0]), test_enumeration.sharpened(models[1]))
    assert test_enumeration.worst(sharp, test_enumeration.greedy, test_enumeration.fixed(4)) == 0


def penalties_in_blocks() -> None:
    test_enumeration.test_penalties_grow_within_a_block_as_in_plain_decoding("rejection")


def filtered_laws() -> None:
    test_enumeration.test_filters_are_plain_decodings("rejection")


def tied_order() -> None:
    order = test_schedule.admission_order(np.full((2, 2), 0.5)).tolist()
    assert order == [0, 1, 2, 3]  # by position, then by request


def monotone_survival() -> None:
    rng = np.random.default_rng(0)
    near_one = 1.0 - rng.integers(0, 4, (4000, 7)) * 2.0**-53
    near_one[:, :3] = rng.uniform(0.4, 1.0, (4000, 3))
    values = test_schedule.survival(near_one)
    assert (np.diff(values, axis=1) <= 0).all()
    assert (values[:, 6] < values[:, 0]).all()


ACCEPT, SCHEDULE = "dspark_sglang.core.accept", "dspark_sglang.core.schedule"
MUTATIONS = {
    "the correction keeps the drafter's mass": Mutation(
        ACCEPT,
        "final = final.index_copy(0, stopped, residual)",
        "final = final.index_copy(0, stopped, own)",
        ("accept_sampled",),
        test_enumeration,
        rounds("sampled"),
    ),
    "a test against q instead of p / q": Mutation(
        ACCEPT,
        "uniforms[:, :gamma] * q < p",
        "uniforms[:, :gamma] < p",
        ("accept_sampled",),
        test_enumeration,
        rounds("sampled"),
    ),
    "tokens are accepted past a rejection": Mutation(
        ACCEPT,
        "count = kept.long().cumprod(dim=1).sum(dim=1)\n    return _finish",
        "count = kept.long().sum(dim=1)\n    return _finish",
        ("accept_sampled",),
        test_enumeration,
        rounds("sampled"),
    ),
    "block weights are not capped at 1": Mutation(
        ACCEPT,
        "(survives[:, k] * ratio).clamp(max=1.0)",
        "(survives[:, k] * ratio)",
        ("accept_block",),
        test_enumeration,
        rounds("block"),
    ),
    "a block's correction forgets its weight": Mutation(
        ACCEPT,
        "survives.gather(1, count[:, None])[:, 0], uniforms[:, gamma])",
        "torch.ones_like(uniforms[:, 0]), uniforms[:, gamma])",
        ("accept_block",),
        test_enumeration,
        rounds("block"),
    ),
    "the bonus comes from the row before": Mutation(
        ACCEPT,
        "return Accepted(count=count, token=choice[first + count])",
        "return Accepted(count=count, token=choice[first + (count - 1).clamp(min=0)])",
        ("accept_greedy",),
        test_enumeration,
        greedy_rounds,
    ),
    "penalties do not see the block's own tokens": Mutation(
        "dspark_sglang.core.penalties",
        "before.int())",
        "(before & False).int())",
        ("Penalties",),
        test_enumeration,
        penalties_in_blocks,
    ),
    "min_new_tokens counts from the block's start": Mutation(
        "dspark_sglang.core.penalties",
        "[slot] + place",
        "[slot]",
        ("Penalties",),
        test_enumeration,
        penalties_in_blocks,
    ),
    "top-p drops the token that crosses it": Mutation(
        "dspark_sglang.core.sampling",
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        ("filter_weights",),
        test_enumeration,
        filtered_laws,
    ),
    "ties go to the earlier request": Mutation(
        f"{SCHEDULE}.admission",
        "    if len(values) < _VECTORISED:\n",
        "    requests, gamma = survival.shape\n"
        '    flat = np.argsort(-survival.reshape(-1), kind="stable")\n'
        "    return (flat % gamma) * requests + flat // gamma\n"
        "    if len(values) < _VECTORISED:\n",
        ("admission_order",),
        test_schedule,
        tied_order,
    ),
    "survival multiplied in another order at every other position": Mutation(
        "dspark_sglang.core.schedule.admission",
        "    return products.T\n",
        "    for position in range(3, len(values), 2):\n"
        "        products[position] = np.multiply.reduce(values[position::-1], axis=0)\n"
        "    return products.T\n",
        ("survival",),
        test_schedule,
        monotone_survival,
    ),
    "the walk looks past the first fall": Mutation(
        f"{SCHEDULE}.budget",
        "stop = first if falls[first] else len(order)",
        "stop = int(np.argmax(theta))",
        ("early_stop_budget",),
        test_schedule,
        test_schedule.test_early_stop_preserves_the_target_law,
    ),
    "the hash forgets the position": Mutation(
        "dspark_sglang.core.seeded",
        "state = _mix(state, positions & _MASK)[:, None]",
        "state = state[:, None]",
        ("hash32",),
        test_seeded,
        lambda: test_seeded.test_the_hash_is_murmur3(42),
    ),
}


def mutated(module: str, before: str, after: str) -> types.ModuleType:
    """The module with one change in its source."""
    original = importlib.import_module(module)
    source = inspect.getsource(original)
    assert source.count(before) == 1, f"{module} has {before!r} {source.count(before)} times"
    made = types.ModuleType(module)
    made.__file__ = original.__file__
    # Frozen dataclasses look their module up while they are made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, made)
        exec(compile(source.replace(before, after), module, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_change_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    mutation.check()
    wrong = mutated(mutation.module, mutation.before, mutation.after)
    for symbol in mutation.names:
        monkeypatch.setattr(mutation.tests, symbol, getattr(wrong, symbol))
    if "METHODS" in vars(mutation.tests):
        monkeypatch.setitem(mutation.tests.METHODS, "rejection", mutation.tests.accept_sampled)
    with pytest.raises(AssertionError):
        mutation.check()
