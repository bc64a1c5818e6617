"""Many replicas at once: a router spreads requests, processes simulate them.

Replicas share nothing but the router, so each is simulated on its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.simulate.acceptance import Mixture
from dspark_sglang.simulate.arrivals import Requests
from dspark_sglang.simulate.costs import StepTimes
from dspark_sglang.simulate.engine import Replica, Result, Setting
from dspark_sglang.simulate.options import Router

#: Told the requests answered so far.
Progress = Callable[[int], None]


class Job(NamedTuple):
    """A replica to simulate, whole: it may run in another process."""

    setting: Setting
    requests: Requests
    times: StepTimes
    blocks: Mixture | None
    cost: CostModel | None

    def run(self, progress: Callable[[int, float], None] = lambda answered, now: None) -> Result:
        """Simulate it here."""
        replica = Replica(
            self.setting, self.requests, times=self.times, blocks=self.blocks, cost=self.cost
        )
        return replica.run(progress)


def spread(
    requests: Requests, count: int, router: Router, *, speed: float, rng: np.random.Generator
) -> list[Requests]:
    """Requests of each of ``count`` replicas.

    Args:
        count: at least 1.
        speed: answer tokens a second of one replica, for ``least-work``.
    """
    size = len(requests.at)
    place: npt.NDArray[np.int64] = np.arange(size) % count
    if router == "random":
        place = rng.integers(0, count, size)
    elif router == "least-work":
        work, last = np.zeros(count), 0.0
        for number, (at, tokens) in enumerate(zip(requests.at, requests.output, strict=True)):
            work = np.maximum(0.0, work - (at - last) * speed)
            last = at
            place[number] = chosen = int(work.argmin())
            work[chosen] += tokens
    return [requests.take(place == replica) for replica in range(count)]


def run(
    jobs: Sequence[Job], *, workers: int = 1, progress: Progress = lambda n: None
) -> list[Result]:
    """Simulate all jobs.

    Args:
        workers: processes; 1: this one.
        progress: told the requests answered so far; by several processes, when a replica has ended.

    Returns:
        A result for each job in order. After an interrupt those that had begun are cut short and marked;
        those that had not are left out.
    """
    found: dict[int, Result] = {}

    def answered() -> int:
        return sum(len(result.number) for result in found.values())

    if workers <= 1 or len(jobs) == 1:
        for number, job in enumerate(jobs):
            found[number] = job.run(lambda more, now: progress(answered() + more))
            if found[number].interrupted:
                break
        return list(found.values())
    # A fresh interpreter: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(Job.run, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress(answered())
        except KeyboardInterrupt:
            # The terminal has interrupted the workers as well: they hand back what they have.
            pool.shutdown(cancel_futures=True)
            for future, number in futures.items():
                if not future.cancelled() and future.exception() is None:
                    found[number] = future.result()
    results = [found[number] for number in sorted(found)]
    if len(found) < len(jobs):
        results = [msgspec.structs.replace(result, interrupted=True) for result in results]
    return results
