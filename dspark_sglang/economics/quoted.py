"""The arithmetic quoted with DSpark, done again, and what would have to be true for it.

Two sources are mixed in it: DeepSeek's disclosed day of V3 and R1 (before), and list prices of V4-Pro (after).
"""

from __future__ import annotations

import msgspec

from dspark_sglang.economics import account, prices
from dspark_sglang.economics.account import Hour, Stage

#: Published. DeepSeek's open-infra-index, day 6: a node has 8 GPUs, means over 24 hours.
NODE_GPUS = 8
NODE_DECODE_TOK_S = 14_800.0
DAY_NODES = 226.75
DAY_OUTPUT_TOKENS = 168e9
DAY_COST = 87_072.0
DAY_REVENUE = 562_027.0
DAY_PROFIT_OVER_COST = 5.45
#: Published. Quoted with DSpark.
TOKENS_HOUR = 5e6
REVENUE_HOUR = 4.4
#: Published. Faster users at matched throughput, or throughput at a matched speed: the range over both models.
DECODE_GAIN = (1.51, 1.85)


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A published figure beside ours. ``published`` is None where the figure follows but was not given."""

    what: str
    unit: str
    published: float | None
    computed: float
    how: str


class Quoted(msgspec.Struct, frozen=True, kw_only=True):
    """All claims, and the quoted hour with what it leaves out."""

    claims: list[Claim]
    stages: list[Stage]
    reading: str


def work_out() -> Quoted:
    """Do the arithmetic with the presets ``quoted``, ``r1-2025`` and ``v4-pro``."""
    bare, day, whole = (prices.load(name, None) for name in ("quoted", "r1-2025", "v4-pro"))
    values, rate = day.values(), NODE_DECODE_TOK_S / NODE_GPUS
    before = account.hour(rate, values)
    after = [account.hour(rate * gain, values) for gain in DECODE_GAIN]
    low, high = (hour.tokens / 1e6 for hour in after)
    return Quoted(
        claims=[
            *_bare(account.hour(TOKENS_HOUR / 3600, bare.values())),
            *_day(before),
            *(
                Claim(
                    what=f"the same with decoding {gain:g} times as fast",
                    unit="M tokens/GPU-hour",
                    published=TOKENS_HOUR / 1e6,
                    computed=hour.tokens / 1e6,
                    how="prefill takes as long as before",
                )
                for gain, hour in zip(DECODE_GAIN, after, strict=True)
            ),
        ],
        stages=account.stages(TOKENS_HOUR / 3600, whole),
        reading=(
            f"5 million tokens an hour is less than the {rate * 3600 / 1e6:.2f} million of a GPU that only decodes, before "
            f"any gain. It is what a GPU of the whole fleet makes once decoding is {DECODE_GAIN[0]:g} to "
            f"{DECODE_GAIN[1]:g} times as fast ({low:.2f} to {high:.2f} million): prefill is then paid for already. That "
            "is a reading; the source does not say."
        ),
    )


def _bare(hour: Hour) -> list[Claim]:
    assert hour.output_revenue is not None and hour.profit is not None and hour.margin is not None
    return [
        Claim(
            what="output of a GPU, sold",
            unit="$/GPU-hour",
            published=REVENUE_HOUR,
            computed=hour.output_revenue,
            how="5 million tokens at the price a million",
        ),
        Claim(
            what="left of it after the GPU",
            unit="$/GPU-hour",
            published=None,
            computed=hour.profit,
            how=f"less its rent; {hour.margin:.0%} of it",
        ),
        Claim(
            what="cost of output",
            unit="$/M tokens",
            published=None,
            computed=hour.cost_per_million,
            how="rent over tokens",
        ),
    ]


def _day(before: Hour) -> list[Claim]:
    hours = DAY_NODES * NODE_GPUS * 24
    assert before.revenue is not None and before.profit is not None
    return [
        Claim(
            what="before: a GPU that only decodes",
            unit="M tokens/GPU-hour",
            published=NODE_DECODE_TOK_S / NODE_GPUS * 3600 / 1e6,
            computed=before.decode_tokens / 1e6,
            how="14.8 thousand tokens a second and node of 8",
        ),
        Claim(
            what="before: a GPU of the whole fleet",
            unit="M tokens/GPU-hour",
            published=DAY_OUTPUT_TOKENS / hours / 1e6,
            computed=before.tokens / 1e6,
            how=f"prefill takes {before.prefill_share:.0%} of the time; published: 168 billion over 226.75 nodes",
        ),
        Claim(
            what="before: rent of the day",
            unit="$",
            published=DAY_COST,
            computed=before.cost * hours,
            how="226.75 nodes of 8, 24 hours",
        ),
        Claim(
            what="before: revenue of the day",
            unit="$",
            published=DAY_REVENUE,
            computed=before.revenue * hours,
            how="all tokens at R1's prices",
        ),
        Claim(
            what="before: profit over cost",
            unit="%",
            published=100 * DAY_PROFIT_OVER_COST,
            computed=100 * before.profit / before.cost,
            how="revenue less rent, over rent",
        ),
    ]
