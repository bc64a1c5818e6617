"""Tiny random targets of other families with drafters, for servers that a plan is compared with."""

from __future__ import annotations

from pathlib import Path

from dspark_sglang.artifacts import write_bytes
from tests.tiny_models import EOS, VOCABULARY, write_tokenizer

#: Families by the class SGLang runs them with.
FAMILIES = ("qwen3", "gemma3")
_DONE = "complete"


def ensure(folder: Path, family: str, seed: int = 0) -> tuple[Path, Path | None]:
    """The target's and the drafter's folders below ``folder``, made unless already there.

    There is a drafter for ``qwen3`` only: SGLang's Gemma 3 cannot hand its states to one.
    """
    target, drafter, done = folder / "target", folder / "drafter", folder / _DONE
    if not done.is_file():
        _write(target, drafter, family, seed)
        write_bytes(done, family.encode())
    return target, drafter if drafter.is_dir() else None


def _write(target: Path, drafter: Path, family: str, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, Qwen3Config

    from dspark_sglang.layouts.dense.config import DrafterSpec, parse_drafter_config
    from dspark_sglang.layouts.dense.write import drafter_config, write_drafter
    from dspark_sglang.training.model import Drafter
    from dspark_sglang.training.start import initialise

    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "tie_word_embeddings": family == "gemma3",
    }
    config = {"qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}[family](**sizes)
    torch.manual_seed(seed)
    target.mkdir(parents=True, exist_ok=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    write_tokenizer(target)
    if family == "gemma3":
        return
    spec = DrafterSpec(gamma=3, layers=2, markov_rank=16, target_layer_ids=(0, 2, 4))
    raw = drafter_config(spec, config, AutoTokenizer.from_pretrained(target))
    model = Drafter(parse_drafter_config(raw))
    initialise(model, seed)
    write_drafter(drafter, raw, model.state_dict())
