"""Which implementation of the operations a server runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dspark_sglang.core.draft import SAMPLED_SHORTLIST, WHOLE_VOCABULARY
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import target_weights
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.ops import SampledRows, Verified, make, resolve
from dspark_sglang.serving.ops.torch_ops import TorchOps
from dspark_sglang.serving.telemetry import Telemetry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kernels", "device", "wanted"),
    [
        ("auto", CPU, "torch"),
        ("auto", CUDA, "triton"),
        ("torch", CUDA, "torch"),
        ("torch", CPU, "torch"),
        ("triton", CUDA, "triton"),
    ],
)
def test_the_device_decides_unless_told(kernels: str, device: torch.device, wanted: str) -> None:
    assert resolve(kernels, device) == wanted  # type: ignore[arg-type]


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CompatibilityError) as caught:
        make("triton", device=CPU)
    assert "TRITON_INTERPRET=1" in caught.value.fix


def test_without_triton_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve("auto", CPU) == "torch"
    with pytest.raises(CompatibilityError, match="Triton is not installed"):
        resolve("auto", CUDA)


def test_torch_operations_import_no_triton() -> None:
    code = (
        "import sys; import torch; before = 'triton' in sys.modules; "
        "from dspark_sglang.serving.ops import torch_ops; "
        "assert 'dspark_kernels' not in sys.modules; "
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_on_a_cpu_imports_no_kernel() -> None:
    pytest.importorskip("sglang")
    code = (
        "import pkgutil, sys; import dspark_sglang.serving.worker; "
        "from dspark_sglang.serving.ops import IMPLEMENTATIONS, resolve; import torch; "
        "pkgutil.resolve_name(IMPLEMENTATIONS[resolve('auto', torch.device('cpu'))]); "
        "assert 'dspark_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def operations(size: int) -> TorchOps:
    """Over a vocabulary of that size, one drafted token, a Markov head of zeros."""
    return TorchOps(
        markov=MarkovHead(w1=torch.zeros(size, 4), w2=torch.zeros(size, 4)),
        confidence=ConfidenceHead(torch.zeros(8), torch.zeros(()), False, torch.ones(1)),
        generator=torch.Generator().manual_seed(0),
        verification="rejection",
        telemetry=Telemetry(gamma=1),
    )


def test_sampled_requests_draft_from_a_longer_list() -> None:
    """A list cuts the tail of a sampled distribution off."""
    size, candidates = WHOLE_VOCABULARY + 1, SAMPLED_SHORTLIST
    ops = operations(size)
    base = torch.randn((2, 1, size), generator=torch.Generator().manual_seed(1))
    anchors = positions = torch.zeros(2, dtype=torch.int64)
    rows = SampledRows(
        index=torch.tensor([1]), temperatures=torch.ones(1), top_k=None, top_p=None, min_p=None
    )
    block = ops.draft(base, torch.zeros(2, 1, 8), anchors, positions, rows, None)
    assert block.probs is not None and block.support is not None
    assert block.probs.shape == block.support.shape == (1, 1, candidates)
    assert set(block.support[0, 0].tolist()) == set(base[1, 0].topk(candidates).indices.tolist())
    assert ops.draft(base, torch.zeros(2, 1, 8), anchors, positions, None, None).probs is None
    # A small vocabulary is not worth one.
    block = operations(192).draft(
        base[..., :192], torch.zeros(2, 1, 8), anchors, positions, rows, None
    )
    assert block.support is None and block.probs is not None and block.probs.shape[-1] == 192


def test_a_step_without_drafted_tokens_draws_as_plain_decoding_does() -> None:
    rows, size = 6000, 7
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)).repeat(rows, 1)
    index = torch.arange(0, rows, 2)  # every other request is greedy
    sampled = SampledRows(
        index=index,
        temperatures=torch.full((len(index),), 0.7),
        top_k=torch.full((len(index),), 4),
        top_p=None,
        min_p=None,
    )
    found = operations(size).accept(
        Verified(
            logits=logits,
            drafted=torch.zeros(rows, 1, dtype=torch.int64),
            rows=sampled,
            probs=torch.zeros(len(index), 1, 1),
            support=None,
            lse=None,
            lens=torch.zeros(rows, dtype=torch.int64),
            first=torch.arange(rows),
            anchors=torch.zeros(rows, dtype=torch.int64),
        )
    )
    assert not found.count.any()
    assert (found.token[1::2] == logits[0].argmax()).all()
    law = target_weights(logits[:1], torch.tensor([0.7]), top_k=torch.tensor([4]))[0]
    law /= law.sum()
    drawn = torch.bincount(found.token[index], minlength=size) / len(index)
    assert ((drawn > 0) == (law > 0)).all()
    spread = (law * (1 - law) / len(index)).sqrt()
    assert ((drawn - law).abs() <= 5 * spread).all()


def test_greedy_requests_may_verify_more_than_was_drafted_for_sampled_ones() -> None:
    size = 7
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, size, generator=generator)  # 4 rows of a copy, 3 of a draft
    logits[range(3), [1, 2, 3]] += 50.0
    sampled = SampledRows(
        index=torch.tensor([1]), temperatures=torch.ones(1), top_k=None, top_p=None, min_p=None
    )
    wide = Verified(
        logits=logits,
        drafted=torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]),
        rows=sampled,
        probs=torch.softmax(torch.randn(1, 2, size, generator=generator), -1),
        support=None,
        lse=None,
        lens=torch.tensor([3, 2]),
        first=torch.tensor([0, 4]),
        anchors=torch.zeros(2, dtype=torch.int64),
    )
    found = operations(size).accept(wide)
    assert found.count[0] == 3 and found.token[0] == logits[3].argmax()
    narrow = operations(size).accept(
        wide._replace(drafted=wide.drafted[:, :2], lens=torch.tensor([2, 2]))
    )
    assert found.count[1] == narrow.count[1] and found.token[1] == narrow.token[1]
