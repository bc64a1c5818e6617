"""``python -m benchmarks.packing``: plain against packed projections, and padded rows.

Times all projections of a model shape once per repetition, so that weights come from memory as they
do in a decode step and not from a cache that holds one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from dspark_sglang.serving.cpu.packing import pack, packed_linear

#: Inputs and outputs of SmolLM2-135M's projections, and its layers.
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
LAYERS = 30


def forward_ms(
    multiply: Callable[[torch.Tensor, Any], object],
    weights: list[tuple[int, Any]],
    inputs: dict[int, torch.Tensor],
    rows: list[int],
) -> list[float]:
    """Milliseconds through all projections for each number of rows; a first pass over all is left out."""
    for _ in range(2):
        spent = []
        for count in rows:
            start = time.perf_counter()
            for width, weight in weights:
                multiply(inputs[width][:count], weight)
            spent.append(1e3 * (time.perf_counter() - start))
    return spent


@torch.inference_mode()
def main() -> None:
    """Print milliseconds of one forward through all projections by type, rows and layout."""
    changing = (torch.randperm(284, generator=torch.Generator().manual_seed(0)) + 17).tolist()
    for dtype in (torch.bfloat16, torch.float32):
        plain = [(i, torch.randn(o, i).to(dtype)) for _ in range(LAYERS) for i, o in SHAPES]
        packed = [(width, pack(weight)) for width, weight in plain]
        inputs = {width: torch.randn(300, width).to(dtype) for width, _ in SHAPES}
        size = sum(weight.nbytes for _, weight in plain) / 1e6
        print(f"{torch.get_num_threads()} threads, {size:.0f} MB, {dtype}")

        def ours(x: torch.Tensor, layout: Any) -> object:
            return packed_linear(x, layout, None)

        def as_it_comes(x: torch.Tensor, layout: Any) -> object:
            return torch.ops.mkldnn._linear_pointwise(x, layout, None, "none", [], "")

        for rows in (1, 2, 6, 16, 64):
            best = [
                min(forward_ms(multiply, weights, inputs, [rows] * 9))
                for multiply, weights in ((linear, plain), (ours, packed))
            ]
            print(f"{rows:3d} rows: plain {best[0]:6.2f} ms, packed {best[1]:6.2f} ms")
        # Hardly two forwards have as many rows.
        mean = [
            sum(forward_ms(multiply, packed, inputs, changing)) / len(changing)
            for multiply in (as_it_comes, ours)
        ]
        print(f"17 to 300 rows in turn: as they come {mean[0]:6.2f} ms, padded {mean[1]:6.2f} ms")


if __name__ == "__main__":
    main()
