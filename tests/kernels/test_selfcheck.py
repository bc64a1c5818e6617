"""The check that every kernel passes before a server uses it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dspark_kernels.support.backend import Backend
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.ops import selfcheck


def test_the_kernels_agree_with_their_references(device: torch.device) -> None:
    selfcheck.check_kernels(device)


@pytest.mark.parametrize("name", selfcheck.CHECKS)
def test_a_kernel_that_disagrees_is_refused(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = selfcheck.CHECKS[name]

    def wrong(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
        found = [tensor.clone() for tensor in right(device, "torch")]
        if backend == "triton":
            # A whole number off by one, or a number off by more than rounding.
            found[-1].view(-1)[-1] += 1
        return found

    monkeypatch.setattr(selfcheck, "CHECKS", {name: wrong})
    with pytest.raises(CompatibilityError) as caught:
        selfcheck.check_kernels(device)
    assert name in caught.value.found and "DSPARK_KERNELS=torch" in caught.value.fix


def test_numbers_that_are_not_numbers_disagree() -> None:
    one = torch.ones(2)
    assert not selfcheck._agree(torch.tensor([1.0, float("nan")]), one)
    assert selfcheck._agree(one + 1e-4, one)
