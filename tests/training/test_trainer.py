"""Training runs: a tiny target of each family, killed, resumed, split over processes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.checkpoint import read_config
from dspark_sglang.cli.app import app
from dspark_sglang.cli.main import main
from dspark_sglang.errors import CheckpointError, ConfigError, DataError, NumericsError
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.tensors import check_tensors
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.training import config as configs
from dspark_sglang.training.distributed import World
from dspark_sglang.training.target import StateSource, Target
from dspark_sglang.training.trainer import Trainer
from tests.training.tiny_training import write_config, write_conversations, write_target

COMMAND = [sys.executable, "-m", "dspark_sglang.cli.main", "train", "--config"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama target and its conversations."""
    folder = tmp_path_factory.mktemp("workshop")
    return write_target(folder / "target"), write_conversations(folder / "data.jsonl", 60)


def build(config: Path, *overrides: str) -> Trainer:
    settings = configs.read_config(config, overrides)
    target = Target(settings.target, bf16=settings.bf16)
    return Trainer(settings, target, World(), log=lambda line: None)


def test_a_v4_is_not_trained_for(tmp_path: Path) -> None:
    tiny.write(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="is a DeepSeek-V4") as error:
        Target(str(tmp_path / "bundle"))
    assert "mtp" in error.value.expected


def run(config: Path) -> str:
    """The command in this process; what it says."""
    done = CliRunner().invoke(app, ["train", "--config", str(config)])
    if done.exception is not None:
        raise done.exception
    return done.output


def losses(folder: Path) -> list[tuple[int, float]]:
    with (folder / "steps.csv").open() as stream:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(stream)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_a_drafter_for_each_family_learns(tmp_path, kind):
    target = write_target(tmp_path / "target", kind)
    data = write_conversations(tmp_path / "data.jsonl", 40)
    config = write_config(tmp_path, target, data)
    trainer = build(config, "optim.steps=40", "loss.full_from=1", "loss.blend=1")
    reports = list(trainer.steps())
    assert reports[-1].step == 40
    first = sum(report.acceptance[0] for report in reports[:5])
    last = sum(report.acceptance[0] for report in reports[-5:])
    assert last > first + 0.1


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_every_markov_head_trains(tmp_path, workshop, head):
    target, data = workshop
    drafter = {"gamma": 3, "layers": 1, "markov_rank": 8, "markov_head": head}
    trainer = build(write_config(tmp_path, target, data, drafter=drafter))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    reports = list(trainer.steps())
    changed = {n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == set(before)
    assert all(0 <= value <= 1 for report in reports for value in report.acceptance)


@pytest.mark.costly
def test_the_command_writes_a_drafter_that_our_loader_takes(tmp_path, workshop):
    said = run(write_config(tmp_path, *workshop))
    folder = tmp_path / "run"
    assert "accepted length" in said
    for name in ("drafter", "best"):
        parsed = parse_drafter_config(read_config(folder / name, role="drafter"))
        check_tensors(folder / name, parsed)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert not list(folder.glob(".*"))


def test_resuming_over_other_text_says_so(tmp_path, workshop):
    target, data = workshop
    own = tmp_path / "data.jsonl"
    own.write_bytes(data.read_bytes())
    config = write_config(tmp_path, target, own)
    trainer = build(config)
    next(trainer.steps())
    trainer.save()
    notes: list[str] = []
    settings = configs.read_config(config)
    Trainer(settings, trainer.target, World(), log=notes.append)
    assert not any("changed since" in note for note in notes)
    own.write_bytes(
        own.read_bytes() + write_conversations(tmp_path / "more", 9, seed=5).read_bytes()
    )
    again = Trainer(settings, trainer.target, World(), log=notes.append)
    assert again.step == 1
    assert any("conversations changed since" in note for note in notes)


def test_a_draft_vocabulary_is_counted_kept_and_dropped(tmp_path, workshop):
    drafter = {"gamma": 3, "layers": 1, "markov_rank": 8, "draft_vocabulary": 30}
    trainer = build(write_config(tmp_path, *workshop, drafter=drafter))
    early, late = trainer.vocabulary(0), trainer.vocabulary(10**6)
    assert early.outer is None and late.outer is not None
    list(trainer.steps())
    trainer.export(tmp_path / "made")
    size = len(trainer.corpus.counts)
    written = read_draft_vocab(tmp_path / "made" / DRAFT_VOCAB_FILE, vocab_size=size)
    chosen = np.zeros(size, dtype=bool)
    chosen[written.tokens] = True
    counts = trainer.corpus.counts
    assert len(written.tokens) == 30 and counts[chosen].min() >= counts[~chosen].max()
    assert written.coverage == pytest.approx(counts[chosen].sum() / counts.sum(), abs=1e-6)
    # Fine-tuning keeps its tokens unless told otherwise.
    del drafter["draft_vocabulary"]
    config = write_config(tmp_path, *workshop, drafter=drafter)
    start = f"start={tmp_path / 'made'}"
    assert build(config, start).drafted == written
    dropped = build(config, start, "drafter.draft_vocabulary=0")
    dropped.export(tmp_path / "made")
    assert not (tmp_path / "made" / DRAFT_VOCAB_FILE).exists()


def test_the_markov_head_starts_from_the_text_where_it_is_new(tmp_path, workshop):
    def begin(*overrides: str) -> tuple[Trainer, bool]:
        notes: list[str] = []
        settings = configs.read_config(config, overrides)
        trainer = Trainer(settings, Target(settings.target), World(), log=notes.append)
        return trainer, any("given the one before" in note for note in notes)

    drafter = {"gamma": 3, "layers": 1, "markov_rank": 8}
    config = write_config(tmp_path, *workshop, drafter=drafter)
    trainer, fitted = begin()
    assert fitted
    bias = trainer.model.markov_head.markov_w2.weight.detach().clone()
    assert bias.abs().max() > 0.1
    assert not begin("markov_from_text=false")[1]
    trainer.export(tmp_path / "made")
    start = f"start={tmp_path / 'made'}"
    again, fitted = begin(start)
    assert not fitted
    torch.testing.assert_close(again.model.markov_head.markov_w2.weight, bias, atol=0.02, rtol=0.02)
    assert begin(start, "markov_from_text=true")[1]
    # What was resumed was begun already.
    next(trainer.steps())
    trainer.save()
    assert not begin()[1]


@pytest.mark.costly
def test_kill_9_and_resume_is_exact(tmp_path, workshop):
    """Every run is a process of its own: what other tests left in this one changes the last digits."""
    optim = {"steps": 30, "lr": 3e-3, "warmup": 2}
    (tmp_path / "whole").mkdir()
    whole = write_config(tmp_path / "whole", *workshop, optim=optim)
    killed = write_config(tmp_path, *workshop, optim=optim)
    folder = tmp_path / "run"

    def train(config: Path) -> str:
        return subprocess.run(
            [*COMMAND, str(config)], check=True, env=ENVIRONMENT, capture_output=True, text=True
        ).stdout

    train(whole)
    with subprocess.Popen(
        [*COMMAND, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    ) as process:  # fmt: skip
        while not (folder / "state.pt").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert "resumed after step" in train(killed)
    assert losses(folder) == losses(tmp_path / "whole/run")
    ours, theirs = (
        load_file(f / "drafter/model.safetensors") for f in (folder, tmp_path / "whole/run")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.costly
def test_two_processes_are_one_with_twice_the_batch(tmp_path, workshop):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = write_config(tmp_path / "one", *workshop, batch={"sequences": 4, "anchors": 6})
    two = write_config(tmp_path / "two", *workshop, batch={"sequences": 2, "anchors": 6})
    run(one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "--rdzv-backend", "c10d"]
    subprocess.run(
        [*torchrun, "-m", "dspark_sglang.cli.main", "train", "--config", str(two)],
        check=True, env=ENVIRONMENT, capture_output=True,
    )  # fmt: skip
    for (step, alone), (same, shared) in zip(
        losses(tmp_path / "one/run"), losses(tmp_path / "two/run"), strict=True
    ):
        assert step == same
        assert shared == pytest.approx(alone, rel=2e-4)


def test_accumulation_is_the_larger_batch(tmp_path, workshop):
    config = write_config(tmp_path, *workshop)
    whole = [report.loss for report in build(config).steps()]
    split = build(config, "batch.sequences=2", "batch.accumulate=2").steps()
    assert [report.loss for report in split] == pytest.approx(whole, rel=2e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, workshop):
    config = write_config(tmp_path, *workshop)
    trainer = build(config)
    steps = trainer.steps()
    next(steps)
    trainer.save()
    kept = (tmp_path / "run/state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.fc.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="step 2 is nan"):
        next(steps)
    assert (tmp_path / "run/state.pt").read_bytes() == kept
    assert build(config).step == 1


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, workshop):
    trainer = build(write_config(tmp_path, *workshop))
    steps = trainer.steps()
    next(steps)
    trainer.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NumericsError, match="gradient norm of step 2"):
        next(steps)
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_another_configuration_is_not_continued(tmp_path, workshop):
    config = write_config(tmp_path, *workshop)
    build(config).save()
    with pytest.raises(DataError, match="other drafter"):
        build(config, "drafter.gamma=2")
    assert build(config, "optim.steps=50").step == 0


@pytest.mark.parametrize("damage", ["text", "empty", "zeros", "cut"])
def test_a_damaged_state_says_so(tmp_path, workshop, damage):
    config = write_config(tmp_path, *workshop)
    build(config).save()
    state = tmp_path / "run/state.pt"
    whole = state.read_bytes()
    bad = {"text": b"half a file", "empty": b"", "zeros": bytes(500), "cut": whole[:-4000]}
    state.write_bytes(bad[damage])
    with pytest.raises(DataError, match="cannot be read"):
        build(config)


def test_a_full_disk_keeps_the_previous_state(tmp_path, workshop):
    import resource

    trainer = build(write_config(tmp_path, *workshop))
    trainer.save()
    kept = (tmp_path / "run/state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "run/state.pt").read_bytes() == kept
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.pt"]


@pytest.mark.costly
def test_patience_stops_early(tmp_path, workshop):
    # With a learning rate of nothing the first validation stays the best.
    config = write_config(
        tmp_path, *workshop, optim={"steps": 60, "lr": 1e-12, "warmup": 1}, patience=2
    )
    run(config)
    assert losses(tmp_path / "run")[-1][0] == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter.gamma": 0}, "drafter.gamma"),
        ({"optim.lr": -1}, "optim.lr"),
        ({"optim.speed": 2}, "speed"),
        ({"drafter.markov_head": "magic"}, "magic"),
        ({"data.files": []}, "data.files"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, workshop, change, message):
    config = write_config(tmp_path, *workshop)
    assignments = [
        f"{name}={msgspec.json.encode(value).decode()}" for name, value in change.items()
    ]
    with pytest.raises(ConfigError, match=message):
        configs.read_config(config, tuple(assignments))


def test_layers_outside_the_target_are_refused(tmp_path, workshop):
    config = write_config(tmp_path, *workshop)
    with pytest.raises(CheckpointError, match=r"target_layer_ids \[1, 9\]"):
        build(config, "drafter.target_layer_ids=[1, 9]")


def test_errors_of_the_command_are_one_line(tmp_path, workshop, monkeypatch, capsys):
    target, _ = workshop
    config = write_config(tmp_path, target, tmp_path / "missing.jsonl")
    monkeypatch.setattr(sys, "argv", ["dspark", "train", "--config", str(config)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "missing.jsonl cannot be read" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("limit", [0, 10_000, 1 << 30], ids=["none", "some", "all"])
@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
def test_the_cache_is_bounded_and_changes_nothing(tmp_path, workshop, limit, disk):
    trainer = build(write_config(tmp_path, *workshop), "cache.kind=none")
    sequences = trainer.corpus.train[:6]
    folder = tmp_path / "states" if disk else None
    source = StateSource(trainer.target, (1, 2), sequences, limit=limit, folder=folder)
    again = [source.get([0, 3, 5]) for _ in range(2)]
    fresh = StateSource(trainer.target, (1, 2), sequences, limit=0).get([0, 3, 5])
    for states in again:
        assert torch.equal(states.layers, fresh.layers)
        assert torch.equal(states.final, fresh.final)
    assert source.cached_bytes <= limit
    total = 2 * sum(len(sequences[i].tokens) for i in (0, 3, 5))
    assert source.computed + source.reused == total
    kept = source.reused / (total / 2)
    assert kept == 0 if limit == 0 else 0 < kept < 1 if limit == 10_000 else kept == 1
    assert folder is None or not folder.exists() or not list(folder.iterdir())  # nothing is left


def test_the_example_file_is_a_config(tmp_path):
    from dspark_sglang.cli.train import EXAMPLE

    path = tmp_path / "train.yaml"
    path.write_text(EXAMPLE)
    assert configs.read_config(path).optim.lr == 1e-3
