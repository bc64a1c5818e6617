"""What a served round launches around the models."""

from __future__ import annotations

from benchmarks.served import count_step


def test_operations_of_a_round_launch_little() -> None:
    """Drafting and acceptance take three each, its end two; confidence, survival, admission and the window one each."""
    found = count_step()
    assert found.launches == 12
    # Reading the flag of an acceptance that has already run, which waits for nothing on CUDA.
    assert found.operations == {"max": 1, "_local_scalar_dense": 1}
