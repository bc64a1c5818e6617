"""The short form of ``dspark lossless``: three options and a mutant through the real server."""

from __future__ import annotations

import pytest

from dspark_sglang.lossless import sampled
from dspark_sglang.lossless.law import Law, Model
from dspark_sglang.lossless.models import PROMPT
from dspark_sglang.lossless.options import choose
from dspark_sglang.lossless.sampled import Setting
from dspark_sglang.lossless.store import Clock

pytestmark = pytest.mark.server
#: A correct server fails a check at this level once in ten thousand seeds; the seeds are fixed.
THRESHOLD = 1e-4


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("lossless"), 0, 2_000, 1_024)


@pytest.fixture(scope="module")
def model(setting: Setting) -> Model:
    return Model(setting.models()[0], PROMPT)


def test_sampled_output_follows_plain_decodings_law(setting: Setting, model: Model) -> None:
    options = choose("all_filters,frequency_penalty,grammar")
    drawn = sampled.draw(setting, options, clock=Clock(0), advance=lambda *_: None)
    for option in options:
        counts = drawn[option.name].outputs()
        verdict = sampled.judge("", Law(model, option.request), counts)
        assert verdict.samples >= 2_000 and verdict.freedom > 30
        assert verdict.p_value > THRESHOLD, (option.name, verdict)


def test_a_wrong_acceptance_is_noticed(setting: Setting, model: Model) -> None:
    option = choose("temperature")[0]
    verdict = sampled.challenge(setting, option, model, clock=Clock(0), advance=lambda *_: None)
    assert verdict is not None
    assert verdict.p_value < THRESHOLD
