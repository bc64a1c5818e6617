"""``python -m benchmarks.packing``: plain against packed projections, and padded rows.

Times all projections of a model shape once per repetition, so that weights come from memory as they
do in a decode step and not from a cache that holds one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from dspark_sglang.serving.cpu.packing import pack, packed_linear

#: Inputs and outputs of SmolLM2-135M's projections, and its layers.
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
LAYERS = 30


def best_ms(run: Callable[[], None], *, repetitions: int = 9) -> float:
    """The fastest of several runs in milliseconds, the first one left out."""
    run()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


@torch.inference_mode()
def main() -> None:
    """Print milliseconds of one forward through all projections by type, rows and layout."""
    for dtype in (torch.bfloat16, torch.float32):
        weights = [
            torch.randn(out, width).to(dtype) for _ in range(LAYERS) for width, out in SHAPES
        ]
        size = sum(weight.nbytes for weight in weights) / 1e6
        print(f"{torch.get_num_threads()} threads, {size:.0f} MB, {dtype}")
        compare(weights)
        changing(weights)


def compare(weights: list[torch.Tensor]) -> None:
    """Print the times of one set of weights."""
    packed = [pack(weight) for weight in weights]
    for rows in (1, 2, 6, 16, 64):
        inputs = {width: torch.randn(rows, width).to(weights[0].dtype) for width, _ in SHAPES}

        def plain(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        def ours(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight, layout in zip(weights, packed, strict=True):
                packed_linear(inputs[weight.shape[1]], layout, None)

        print(f"{rows:3d} rows: plain {best_ms(plain):6.2f} ms, packed {best_ms(ours):6.2f} ms")


def changing(weights: list[torch.Tensor]) -> None:
    """Print the mean time of forwards of which hardly two have as many rows, as they come and padded."""
    packed = [pack(weight) for weight in weights]
    counts = torch.randperm(284, generator=torch.Generator().manual_seed(0)) + 17
    inputs = {width: torch.randn(300, width).to(weights[0].dtype) for width, _ in SHAPES}

    def mean_ms(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        lasted = 0.0
        for _ in range(2):  # once around to meet all of them
            start = time.perf_counter()
            for rows in counts.tolist():
                for weight, layout in zip(weights, packed, strict=True):
                    multiply(inputs[weight.shape[1]][:rows], layout)
            lasted = time.perf_counter() - start
        return 1e3 * lasted / len(counts)

    as_they_come = mean_ms(
        lambda x, layout: torch.ops.mkldnn._linear_pointwise(x, layout, None, "none", [], "")
    )
    padded = mean_ms(lambda x, layout: packed_linear(x, layout, None))
    print(f"17 to 300 rows in turn: as they come {as_they_come:6.2f} ms, padded {padded:6.2f} ms")


if __name__ == "__main__":
    main()
