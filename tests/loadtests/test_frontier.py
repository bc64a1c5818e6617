"""The frontier: which points are on it, and what is read between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_loadtests import frontier
from dspark_loadtests.frontier import Frontier, Point, Series
from dspark_sglang import artifacts
from dspark_sglang.errors import ArtifactError


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(load=i + 1, tok_s_per_user=u, tok_s_per_gpu=g) for i, (u, g) in enumerate(pairs)]


def test_beaten_points_are_left_out() -> None:
    found = frontier.non_dominated(points((10, 100), (9, 90), (8, 120), (8, 110), (12, 50)))
    assert [(p.tok_s_per_user, p.tok_s_per_gpu) for p in found] == [(12, 50), (10, 100), (8, 120)]


def test_reads_between_neighbours_and_not_beyond_the_fast_end() -> None:
    line = points((10, 100), (20, 50))
    assert frontier.throughput_at(line, 15) == pytest.approx(75)
    assert frontier.throughput_at(line, 5) == 100
    assert frontier.throughput_at(line, 21) is None
    assert frontier.speed_at(line, 75) == pytest.approx(15)
    assert frontier.speed_at(line, 101) is None


def test_file_round_trip_and_what_is_not_one(tmp_path: Path) -> None:
    made = Frontier(
        source="simulated",
        model="m",
        hardware="h",
        series=[Series(name="dspark", gpus=8, points=points((1, 2)))],
    )
    path = tmp_path / "a" / "frontier.json"
    artifacts.write_json(path, made)
    assert frontier.read(path) == made
    assert made.of("dspark").gpus == 8
    with pytest.raises(ArtifactError, match="Expected one of: dspark"):
        made.of("none")
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="a frontier"):
        frontier.read(path)
    with pytest.raises(ArtifactError, match="a frontier"):
        frontier.read(tmp_path / "missing.json")
