"""What a served round launches around the models."""

from __future__ import annotations

from benchmarks.served import count_step


def test_operations_of_a_round_launch_little() -> None:
    """Goal: gamma + 4 = 9, writing the draft's KV among them. A copy from the host and one to it come beside."""
    found = count_step()
    assert found.launches == 8
    # Reading the flag of an acceptance that has already run, which waits for nothing on CUDA.
    assert found.operations == {"max": 1, "_local_scalar_dense": 1}
