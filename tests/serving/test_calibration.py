"""Calibration fitted in service: to the blocks that were verified, and to enough of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_sglang.core.schedule.correction import Blocks
from dspark_sglang.core.sts import sigmoid
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.evaluation.refit import refit
from dspark_sglang.serving import calibration

GAMMA = 3


def blocks(count: int, *, scale: float, sampled: bool, seed: int = 0) -> Blocks:
    """Verified blocks of a head whose logits are ``scale`` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.8, 1.2, (count, GAMMA)) * scale
    accepted = rng.random((count, GAMMA)) < sigmoid(logits / scale)
    lens = rng.integers(1, GAMMA + 1, count)
    counts = np.minimum(accepted.cumprod(axis=1).sum(axis=1), lens)
    return Blocks(logits, lens, counts, np.full(count, sampled))


def both(one: Blocks, other: Blocks) -> Blocks:
    return Blocks(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


def test_the_scale_of_a_head_is_found() -> None:
    found = calibration.fit(blocks(4096, scale=3.0, sampled=True))
    assert found.temperatures[:2] == pytest.approx([3.0] * 2, rel=0.35)
    assert found.after < found.before / 2
    assert found.blocks == 4096


def test_the_last_position_is_as_right_on_average_as_the_first() -> None:
    """Few of its tokens are reached, and their calibration error is about the same everywhere."""
    found = [
        calibration.fit(blocks(1500, scale=2.0, sampled=True, seed=seed)).temperatures
        for seed in range(10)
    ]
    off = np.log(np.array(found) / 2.0)
    assert np.abs(off.mean(axis=0)).max() < 0.15
    assert np.sqrt((off**2).mean(axis=0)).max() < 0.35


def test_sampled_requests_decide_where_there_are_enough() -> None:
    greedy = blocks(3000, scale=0.5, sampled=False)
    many = calibration.fit(both(greedy, blocks(1500, scale=3.0, sampled=True)))
    assert many.blocks == 1500 and min(many.temperatures) > 1.5
    few = calibration.fit(both(greedy, blocks(calibration.FEWEST - 1, scale=3.0, sampled=True)))
    assert few.blocks == 3000 + calibration.FEWEST - 1 and max(few.temperatures) < 1.5


def test_too_few_blocks_are_refused() -> None:
    few = blocks(calibration.FEWEST - 1, scale=1.0, sampled=False)
    with pytest.raises(ConfigError, match=f"{calibration.FEWEST - 1} blocks") as caught:
        calibration.fit(few)
    assert str(calibration.FEWEST) in caught.value.expected
    with pytest.raises(ConfigError, match="0 blocks"):
        calibration.fit(blocks(0, scale=1.0, sampled=True))


class Fitting(HTTPServer):
    """A server with a key that fits when it is told to."""

    fitted = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Fitting

    def _answer(self, value: Any) -> None:
        known = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self) -> None:
        record = {
            "active": True, "gamma": 1, "temperatures": [1.0 + self.server.fitted], "sts": "fitted",
            "drafter_sha256": "0" * 64, "ece": [0.1],
            "reliability": {"seen": [[[9.0]], [[0.0]]], "predicted": [[[5.0]], [[0.0]]], "kept": [[[5.0]], [[0.0]]]},
        }  # fmt: skip
        self._answer({"internal_states": [{"dspark_info_record": record}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.fitted += self.headers["Authorization"] == "Bearer secret"
        self._answer([True])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fitting() -> Iterator[Fitting]:
    with Fitting() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_running_server_with_a_key(
    fitting: Fitting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    with pytest.raises(ServerError, match="401") as caught:
        refit(fitting.url, None)
    assert "API_KEY" in caught.value.fix and f"{fitting.url}/server_info" in caught.value.found
    monkeypatch.setenv("API_KEY", "secret")
    refit(fitting.url, tmp_path / "new" / "sts.json")
    written = json.loads((tmp_path / "new" / "sts.json").read_text())
    assert fitting.fitted == 1 and written["temperatures"] == [2.0]


def test_a_server_is_left_alone_where_its_fit_cannot_be_kept(
    fitting: Fitting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "sts.json", tmp_path):
        with pytest.raises(ConfigError) as caught:
            refit(fitting.url, out)
        assert str(out) in caught.value.found
    assert fitting.fitted == 0
