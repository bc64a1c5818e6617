"""Frontiers for tests of economics and reports. All of them are synthetic: no machine made them."""

from __future__ import annotations

from dspark_sglang.load.frontier import Frontier, Point, Series

#: Load, tokens a second and GPU, tokens a second and user, milliseconds to the first token.
_MTP = ((8, 110, 110, 100), (256, 2000, 85, 300), (2048, 5000, 30, 900))
_DSPARK = ((8, 180, 180, 100), (256, 3200, 120, 300), (2048, 6000, 60, 900))


def synthetic_frontier(model: str = "deepseek-v4-flash-dspark", ttft: bool = True) -> Frontier:
    """Two ways of serving, the second better everywhere."""
    return Frontier(
        source="simulated",
        model=model,
        hardware="synthetic GPUs",
        assumptions={"origin": "synthetic, for a test"},
        series=[
            Series(name=name, gpus=8, points=[_point(row, ttft) for row in rows])
            for name, rows in (("MTP-1", _MTP), ("DSpark-5", _DSPARK))
        ],
    )


def _point(row: tuple[float, float, float, float], ttft: bool) -> Point:
    load, gpu, user, ms = row
    return Point(load=load, tok_s_per_gpu=gpu, tok_s_per_user=user, ttft_ms=ms if ttft else None)
