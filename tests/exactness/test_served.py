"""The short form of ``make exactness``: three options and a mutant through the real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.exactness import sampled
from tests.exactness.distribution import Distribution, Model
from tests.exactness.options import choose
from tests.exactness.sampled import Setting
from tests.exactness.store import Clock, Judged, Sampled
from tests.tiny_models import PROMPT

pytestmark = pytest.mark.server
#: A correct server fails a check at this level once in ten thousand seeds; the seeds are fixed.
THRESHOLD = 1e-4
OPTIONS = choose("all_filters,frequency_penalty,grammar")
MUTATED = choose("temperature")[0]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    made = Setting(tmp_path_factory.mktemp("exactness"), 0, 2_000, 1_024)
    made.models()
    return made


@pytest.fixture(scope="module")
def model(setting: Setting) -> Model:
    return Model(setting.models()[0], PROMPT)


Both = tuple[Future[dict[str, Sampled]], Future[Judged | None]]


@pytest.fixture(scope="module")
def both(setting: Setting, model: Model) -> Iterator[Both]:
    """The server and the one with a mutant, side by side: most of their time is the start."""
    with ThreadPoolExecutor(2) as pool:
        clock = Clock(0)
        yield (
            pool.submit(sampled.draw, setting, OPTIONS, clock=clock),
            pool.submit(sampled.challenge, setting, MUTATED, model, clock=clock),
        )


def test_sampled_output_follows_plain_decodings_law(both: Both, model: Model) -> None:
    drawn = both[0].result()
    for option in OPTIONS:
        counts = drawn[option.name].outputs()
        verdict = sampled.judge("", Distribution(model, option.request), counts)
        assert verdict.samples >= 2_000 and verdict.freedom > 30
        assert verdict.p_value > THRESHOLD, (option.name, verdict)


def test_a_wrong_acceptance_is_noticed(both: Both) -> None:
    verdict = both[1].result()
    assert verdict is not None
    assert verdict.p_value < THRESHOLD
