"""What every test shares: one thread, fixed seeds, no GPU tests without a GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run: a red test stays red until the code changes.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


#: Kernels' tests set nothing up together, but for this file.
TOGETHER = "tests/kernels/test_aot.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to processes whole (``--dist loadfile``); long kernel tests one by one and last, to fill gaps."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Filling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            alone = file.startswith("tests/kernels/") and file != TOGETHER
            return nodeid if alone else file

    return Filling(config, log)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same global random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
