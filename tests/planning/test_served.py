"""Plans against what real servers allocate for weights and for both pools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning import measure, tiny

pytestmark = pytest.mark.server
#: Per cent.
TOLERANCE = 3.0
DRAFTER = Path(__file__).resolve().parents[2] / "model_cards" / "smollm2-135m-instruct-dspark"
NAMES = (
    "smollm2-135m-instruct",
    *(pytest.param(f"tiny {family}", marks=pytest.mark.slow) for family in tiny.FAMILIES),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, measure.Pair]:
    made = measure.pairs(tmp_path_factory.mktemp("plan"), DRAFTER)
    return {pair.name: pair for pair in made}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_comes_to_what_the_server_allocates(
    pairs: dict[str, measure.Pair], name: str, tmp_path: Path
) -> None:
    compared = measure.compare(pairs[name], tmp_path / "server.log")
    assert set(compared) == set(measure.quantities(pairs[name]))
    for quantity, values in compared.items():
        assert values.allocated > 0
        assert values.error_pct <= TOLERANCE, (quantity, values)
