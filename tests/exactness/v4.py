"""A tiny DeepSeek-V4 bundle whose output distribution can be enumerated by the layout's reference.

Its drafter's Markov head approximates what the target says after each token, so that it is right often and wrong
often. It has few layers, of every kind, and a block as long as an output allows; everything else is as in
:mod:`dspark_sglang.layouts.v4.tiny`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.config import TargetShape
from dspark_sglang.layouts.v4.reference import Reference
from tests import tiny_models as models
from tests.exactness.distribution import Output
from tests.tiny_models import PROMPT, SPECIAL, V4_VOCABULARY, write_tokenizer

_DONE = "complete"
CONFIG = tiny.CONFIG | {
    "vocab_size": len(V4_VOCABULARY),
    "bos_token_id": 1,
    "eos_token_id": models.EOS,
    "dspark_noise_token_id": SPECIAL.index("<mask>"),
    "torch_dtype": "float32",
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "compress_ratios": [0, 0, 4, 128, 0, 0],
    "num_nextn_predict_layers": 2,
    "dspark_target_layer_ids": [2, 3],
    "dspark_block_size": models.GAMMA,
}


class Model:
    """The reference behind one prompt, with the rounding of a server's cache."""

    def __init__(self, directory: Path, prompt: Sequence[int]) -> None:
        self._reference = Reference.load(directory)
        self._prompt = list(prompt)

    def __call__(self, outputs: Sequence[Output]) -> torch.Tensor:
        """Logits ``[N, V]`` float64 after outputs of equal length."""
        rows = [self._reference([*self._prompt, *output]).logits[-1] for output in outputs]
        return torch.stack(rows).double()


def _contexts(made: dict[str, torch.Tensor], seed: int, count: int) -> torch.Tensor:
    """``[count, V]`` logits after random prefixes."""
    reference = Reference(made, TargetShape.from_config(CONFIG))
    generator = torch.Generator().manual_seed(seed + 1)
    prefixes = torch.randint(
        len(SPECIAL), len(V4_VOCABULARY), (count, len(PROMPT)), generator=generator
    )
    return torch.stack([reference(prefix.tolist()).logits[-1] for prefix in prefixes])


def ensure_bundle(folder: Path, seed: int) -> Path:
    """The bundle below ``folder``, made unless already there."""
    bundle, done = folder / "v4", folder / f"v4-{_DONE}"
    if done.is_file() and done.read_text() == str(seed):
        return bundle
    done.unlink(missing_ok=True)
    made = tiny.tensors(CONFIG, seed)
    embedding, width = made["embed.weight"].float(), int(CONFIG["hidden_size"])
    # Repeats are likely, which penalties need; then every distribution has the wanted spread.
    head = made["head.weight"].float() + models.REPEAT / width * embedding
    plain = {k: v.float() if v.is_floating_point() else v for k, v in made.items()}
    plain["head.weight"] = head * models.scale(_contexts(plain | {"head.weight": head}, seed, 256))
    rows = embedding / embedding.square().mean(-1, keepdim=True).sqrt()
    left, values, right = torch.linalg.svd(rows @ plain["head.weight"].T, full_matrices=False)
    rank = int(CONFIG["dspark_markov_rank"])
    root = values[:rank].sqrt()
    last = f"mtp.{len(CONFIG['dspark_target_layer_ids']) - 1}.markov_head."
    plain[f"{last}markov_w1.weight"] = left[:, :rank] * root
    plain[f"{last}markov_w2.weight"] = right[:rank].T * root
    bundle.mkdir(parents=True, exist_ok=True)
    held = {name: value.contiguous() for name, value in plain.items()}
    save_file(held, bundle / "model.safetensors", metadata={"format": "pt"})
    write_bytes(bundle / "config.json", json.dumps(CONFIG, indent=1).encode())
    write_tokenizer(bundle, V4_VOCABULARY)
    write_bytes(done, str(seed).encode())
    return bundle
