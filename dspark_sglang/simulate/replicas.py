"""Many replicas at once: a router spreads requests, processes (or Ray's machines) serve them.

Replicas share nothing but the router, so each is simulated on its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from dspark_sglang.core.steps import CostModel
from dspark_sglang.errors import ConfigError
from dspark_sglang.simulate.acceptance import Mixture
from dspark_sglang.simulate.arrivals import Requests
from dspark_sglang.simulate.costs import StepTimes
from dspark_sglang.simulate.engine import Replica, Result, Setting

#: ``random`` splits a Poisson process into Poisson processes; ``round-robin`` deals in turn;
#: ``least-work`` sends each to the replica with fewest answer tokens still to come, as if each made them
#: at one speed.
Router = Literal["random", "round-robin", "least-work"]
ROUTERS: tuple[Router, ...] = ("random", "round-robin", "least-work")
#: Told the requests answered so far.
Progress = Callable[[int], None]
_POLL_S = 0.25
#: Shared counters of answered requests, set in each worker process.
_answered: Any = None


class Job(NamedTuple):
    """A replica to simulate, whole: it may run in another process or on another machine."""

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
        speed: answer tokens a second of one replica, for ``least-work``.

    Raises:
        ConfigError: an unknown router, or no replicas.
    """
    if router not in ROUTERS or count < 1:
        raise ConfigError(
            f"{count} replicas behind the router {router!r}.",
            expected=f"at least one, and a router among {', '.join(ROUTERS)}",
            fix="Use one of these.",
        )
    size = len(requests.at)
    place: npt.NDArray[np.int64] = np.arange(size) % count
    if router == "random":
        place = rng.integers(0, count, size)
    elif router == "least-work":
        place = _least_work(requests, count, speed)
    return [requests.take(place == replica) for replica in range(count)]


def _least_work(requests: Requests, count: int, speed: float) -> npt.NDArray[np.int64]:
    work, last = np.zeros(count), 0.0
    place = np.zeros(len(requests.at), dtype=np.int64)
    for number, (at, tokens) in enumerate(zip(requests.at, requests.output, strict=True)):
        work = np.maximum(0.0, work - (at - last) * speed)
        last = at
        place[number] = chosen = int(work.argmin())
        work[chosen] += tokens
    return place


def run(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    ray: str | None = None,
    progress: Progress = lambda n: None,
) -> list[Result]:
    """Simulate all jobs.

    Args:
        workers: processes; 1: this one.
        ray: address of a Ray cluster (``auto`` for the one at hand) to run on instead.
        progress: told the requests answered so far.

    Returns:
        A result for each job in order. After an interrupt those that had begun are cut short and marked;
        those that had not are left out.
    """
    if ray is not None:
        return _on_ray(jobs, ray, progress)
    if workers <= 1 or len(jobs) == 1:
        return _here(jobs, progress)
    return _in_processes(jobs, min(workers, len(jobs)), progress)


def _here(jobs: Sequence[Job], progress: Progress) -> list[Result]:
    found: list[Result] = []
    for job in jobs:
        before = sum(len(result.number) for result in found)
        found.append(job.run(lambda answered, now, before=before: progress(before + answered)))  # type: ignore[misc]
        if found[-1].interrupted:
            break
    return found


def _share_counters(counters: Any) -> None:
    global _answered
    _answered = counters


def _work(number: int, job: Job) -> Result:
    def tell(answered: int, now: float) -> None:
        _answered[number] = answered

    return job.run(tell)


def _in_processes(jobs: Sequence[Job], workers: int, progress: Progress) -> list[Result]:
    # A fresh interpreter: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", len(jobs), lock=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_share_counters, initargs=(counters,)
    )
    with pool:
        futures = [pool.submit(_work, number, job) for number, job in enumerate(jobs)]
        try:
            while not all(future.done() for future in futures):
                progress(sum(counters))
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            # The terminal has interrupted the workers as well: they hand back what they have.
            for future in futures:
                future.cancel()
        found = []
        for future in futures:
            if not future.cancelled():
                with suppress(KeyboardInterrupt):
                    found.append(future.result())
    if len(found) < len(jobs):
        found = [msgspec.structs.replace(result, interrupted=True) for result in found]
    return found


def _on_ray(jobs: Sequence[Job], address: str, progress: Progress) -> list[Result]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed.",
            expected="Ray on this machine and on the cluster, the same version",
            fix="`pip install ray`, or leave --ray out to use this machine's processes.",
        ) from error
    try:
        ray.init(
            address=None if address == "local" else address,
            ignore_reinit_error=True,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"No Ray cluster answers at {address}: {error}.",
            expected="a running cluster, or `local` to start one here",
            fix="Start one with `ray start --head`.",
        ) from error
    remote = ray.remote(Job.run)
    waiting = {remote.remote(job): number for number, job in enumerate(jobs)}
    found: dict[int, Result] = {}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
            for reference in done:
                found[waiting.pop(reference)] = ray.get(reference)
            progress(sum(len(result.number) for result in found.values()))
    except KeyboardInterrupt:
        for reference in waiting:
            ray.cancel(reference)
        found = {n: msgspec.structs.replace(r, interrupted=True) for n, r in found.items()}
    finally:
        ray.shutdown()
    return [found[number] for number in sorted(found)]
