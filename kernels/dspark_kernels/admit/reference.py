"""Admission and the ragged layout in plain torch, one candidate after the other."""

from __future__ import annotations

import torch


def reference(
    survival: torch.Tensor, budget: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Admit the ``budget`` candidates most likely to survive and lay out what is verified.

    Args:
        survival: ``[R, gamma]``, non-increasing along each row; NaN and negative values count as 0.
        budget: tokens to admit over all requests.

    Returns:
        ``[R]`` int32 admitted tokens of each request and its rows, ``[R + 1]`` int32 offsets of its rows (the
        anchor and what is admitted), and ``[R * (gamma + 1)]`` int64: for each packed row its
        place in the ``[R, gamma + 1]`` window, then -1.
    """
    requests, gamma = survival.shape
    chances = [[a if a > 0.0 else 0.0 for a in row] for row in survival.tolist()]
    candidates = [(r, j) for r in range(requests) for j in range(gamma)]
    # Best first; ties go to the earlier position, then to the earlier request.
    candidates.sort(key=lambda c: (-chances[c[0]][c[1]], c[1], c[0]))
    lens = [0] * requests
    for r, _ in candidates[: max(budget, 0)]:
        lens[r] += 1

    offsets, rows = [0], []
    for r in range(requests):
        rows += [r * (gamma + 1) + j for j in range(1 + lens[r])]
        offsets.append(len(rows))
    rows += [-1] * (requests * (gamma + 1) - len(rows))
    device = survival.device
    return (
        torch.tensor(lens, dtype=torch.int32, device=device),
        torch.tensor([1 + count for count in lens], dtype=torch.int32, device=device),
        torch.tensor(offsets, dtype=torch.int32, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
    )
