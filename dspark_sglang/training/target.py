"""The target: any Hugging Face causal language model, its states for training, and as the engine's target.

States are computed online, or kept in a bounded cache where they fit. A sequence's states are those of the layers the drafter reads, concatenated, and the final normed
hidden state that the LM head would be applied to: never logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear

from dspark_sglang.errors import CheckpointError, DataError
from dspark_sglang.layouts.base import layout_of
from dspark_sglang.training.chat import TokenSequence


class States(NamedTuple):
    """States of a padded batch."""

    #: ``[B, S, L * d]``.
    layers: torch.Tensor
    #: ``[B, S, d]``.
    final: torch.Tensor


class Target:
    """A frozen Hugging Face causal language model, any architecture.

    Raises:
        CheckpointError: it cannot be loaded, has no decoder layers to read, or is one whose drafters lie in its
            checkpoint.
    """

    def __init__(self, path: str, *, device: str = "cpu", bf16: bool = True) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        fix = "Give the directory of a causal language model with its tokenizer."
        try:
            if layout_of(AutoConfig.from_pretrained(path).to_dict()).bundled:
                raise CheckpointError(
                    f"Target {path} is a DeepSeek-V4.",
                    expected="a target of dense drafters: V4's own drafter lies in its checkpoint (mtp.*)",
                    fix="Serve that one; to train it is not possible here yet.",
                )
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16 if bf16 else torch.float32
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"Target {path} cannot be loaded: {error}.",
                expected="a Hugging Face causal language model",
                fix=fix,
            ) from error
        self.model.to(device).eval().requires_grad_(False)
        self.config: Any = self.model.config.get_text_config()
        self.decoder: Any = self.model.get_decoder()
        layers = getattr(self.decoder, "layers", None)
        if layers is None:
            raise CheckpointError(
                f"{type(self.decoder).__name__} has no list of layers.",
                expected="a decoder with .layers, as Llama, Qwen3 and Gemma have",
                fix=fix,
            )
        self.layers: list[torch.nn.Module] = list(layers)

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return int(self.config.hidden_size)

    @property
    def head(self) -> torch.Tensor:
        """``[V, d]`` LM head."""
        return torch.as_tensor(self.model.get_output_embeddings().weight)

    @property
    def softcap(self) -> float:
        """Final logit soft-capping; 0 for none."""
        return float(getattr(self.config, "final_logit_softcapping", None) or 0.0)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` input embeddings, as the model's own embedding module gives them."""
        return torch.as_tensor(self.model.get_input_embeddings()(tokens))

    @contextmanager
    def capture(self, layer_ids: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collect outputs of decoder layers while the model runs (-1: the first one's input)."""
        found: dict[int, torch.Tensor] = {}
        handles = []
        for layer in layer_ids:
            if layer < 0:

                def before(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                    found[layer] = args[0] if args else kwargs["hidden_states"]

                handles.append(self.layers[0].register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                    found[layer] = output[0] if isinstance(output, tuple) else output

                handles.append(self.layers[layer].register_forward_hook(after))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def states(self, tokens: torch.Tensor, layer_ids: Sequence[int]) -> States:
        """Run the model over ``tokens`` ``[B, S]`` (right-padded: causality hides the padding)."""
        with self.capture(layer_ids) as found:
            out = self.decoder(input_ids=tokens, use_cache=False)
        layers = torch.cat([found[layer] for layer in layer_ids], dim=-1)
        return States(layers, out.last_hidden_state)

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation in the target's chat template, up to where its answer begins.

        Raises:
            DataError: the target has none.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The target's tokenizer has no chat template.",
                expected="a chat model, whose template the drafter was trained with",
                fix="Pass the instruct model, or put its chat_template.jinja beside the tokenizer.",
            )
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return (ends,) if isinstance(ends, int) else tuple(ends or ())


class HFTarget:
    """The same model as :class:`dspark_sglang.core.engine.Target` asks, several sequences together.

    Keys and values of the last sequences are kept, and of the next ones only what follows them is run. A slot of
    the cache is never taken back: what was rejected is masked out.

    Args:
        target: the model, on the CPU.
        layer_ids: decoder layers whose outputs the drafter reads; -1 is the embedding.
    """

    def __init__(self, target: Target, layer_ids: Sequence[int]) -> None:
        self._target = target
        self._layer_ids = tuple(layer_ids)
        #: ``[V, d]`` as the model's own module embeds: scaled where it scales.
        self.embedding = target.embed(torch.arange(target.head.shape[0])).detach()
        #: ``[V, d]``.
        self.head = target.head.detach()
        self._forget()

    def _forget(self) -> None:
        from transformers import DynamicCache

        # Without the model's configuration: all layers keep everything, those with a window too.
        self._cache: Any = DynamicCache()
        #: Tokens and states of each sequence in the cache.
        self._tokens: list[torch.Tensor] = []
        self._states: list[torch.Tensor] = []
        #: ``[B, K]`` position of each slot; -1: it holds nothing.
        self._slots = torch.empty((0, 0), dtype=torch.int64)

    @torch.no_grad()
    def forward(
        self, sequences: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See :meth:`dspark_sglang.core.engine.Target.forward`."""
        kept = self._find(sequences, rows)
        fresh = [tokens[count:] for tokens, count in zip(sequences, kept, strict=True)]
        width = max(len(tokens) for tokens in fresh)
        ids = torch.zeros((len(fresh), width), dtype=torch.int64)
        positions = torch.full((len(fresh), width), -1)
        for row, (tokens, count) in enumerate(zip(fresh, kept, strict=True)):
            ids[row, : len(tokens)] = tokens
            positions[row, : len(tokens)] = count + torch.arange(len(tokens))
            self._slots[row, self._slots[row] >= count] = -1
        self._slots = torch.cat([self._slots, positions], dim=1)
        target = self._target
        with target.capture(self._layer_ids) as found:
            out = target.decoder(
                input_ids=ids,
                position_ids=positions.clamp(min=0),
                attention_mask=self._masks(positions),
                past_key_values=self._cache,
                use_cache=True,
            )
        layers = torch.cat([found[layer] for layer in self._layer_ids], dim=-1)
        made = []
        for row, (tokens, count) in enumerate(zip(sequences, kept, strict=True)):
            end = len(tokens) - count
            self._states[row] = torch.cat([self._states[row][:count], layers[row, :end]])
            final = out.last_hidden_state[row, end - rows[row] : end]
            logits = linear(final, self.head).float()
            cap = target.softcap
            logits = cap * torch.tanh(logits / cap) if cap else logits
            made.append((logits, self._states[row]))
        self._tokens = list(sequences)
        return made

    def _find(self, sequences: Sequence[torch.Tensor], rows: Sequence[int]) -> list[int]:
        """Bring the cache's sequences into the order of ``sequences``; how much of each need not be run.

        Where one is not a continuation of any, all are run from their beginning.
        """
        order: list[int] = []
        kept = []
        for tokens, count in zip(sequences, rows, strict=True):
            shared = [
                0 if row in order else min(_agreeing(tokens, known), len(tokens) - count)
                for row, known in enumerate(self._tokens)
            ]
            kept.append(max(shared, default=0))
            order.append(shared.index(kept[-1]) if kept[-1] else -1)
        if min(kept) == 0:
            self._forget()
            width = len(self._layer_ids) * self._target.hidden
            self._states = [self.head.new_empty((0, width)) for _ in sequences]
            self._slots = torch.empty((len(sequences), 0), dtype=torch.int64)
            return [0] * len(sequences)
        if order != list(range(len(self._tokens))):
            self._cache.batch_select_indices(torch.tensor(order))
            self._slots = self._slots[order]
            self._states = [self._states[row] for row in order]
        return kept

    def _masks(self, positions: torch.Tensor) -> Any:
        """What rows at ``positions`` ``[B, Q]`` see of the slots: one mask, or one for each kind of layer."""
        at, slots = positions[..., None], self._slots[:, None]
        seen = (slots >= 0) & (slots <= at)
        kind = self._target.model.dtype

        def additive(visible: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(visible.shape, dtype=kind)
            return mask.masked_fill_(~visible, torch.finfo(kind).min)[:, None]

        config = self._target.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:
            return additive(seen)
        near = at - slots < (config.sliding_window or slots.shape[-1] + 1)
        return {
            name: additive(seen & near if name == "sliding_attention" else seen) for name in kinds
        }


def _agreeing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two sequences begin with alike."""
    shared = min(len(one), len(other))
    return int((one[:shared] == other[:shared]).long().cumprod(0).sum())


class StateSource:
    """Target states of numbered sequences: from the cache, or computed and then cached.

    The cache is one flat array of states, in memory or in an unlinked file, filled in the order
    sequences are first asked for until its bound is reached. States are kept in bfloat16.

    Args:
        target: the model.
        layer_ids: layers read.
        sequences: all sequences that may be asked for.
        limit: bytes of the cache; 0 computes everything every time.
        folder: where a disk cache goes; None for memory.

    Raises:
        DataError: the disk has no room for ``limit``.
    """

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sequences: Sequence[TokenSequence],
        *,
        limit: int,
        folder: Path | None = None,
    ) -> None:
        self._target, self._layer_ids = target, tuple(layer_ids)
        self._sequences = sequences
        self.width = (len(self._layer_ids) + 1) * target.hidden
        wanted = sum(len(sequence.tokens) for sequence in sequences)
        self.capacity = min(wanted, limit // (2 * self.width))
        self._store = self._allocate(folder)
        self._place: dict[int, int] = {}
        self._used = 0
        #: Tokens the target was run over, and tokens found in the cache.
        self.computed = 0
        self.reused = 0

    @property
    def cached_bytes(self) -> int:
        """Bytes of states kept now."""
        return self._used * self.width * 2

    def _allocate(self, folder: Path | None) -> torch.Tensor:
        shape = (self.capacity, self.width)
        if folder is None or not self.capacity:
            return torch.empty(shape, dtype=torch.bfloat16)
        size = self.capacity * self.width * 2
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"states-{os.getpid()}.bin"
        try:
            with path.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)
            flat = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.bfloat16)
        except OSError as error:
            raise DataError(
                f"{folder} has no room for {size / 2**30:.1f} GiB of states: {error.strerror}.",
                expected="cache.gib of free space",
                fix="Lower cache.gib, or set cache.kind to none: states are then computed online.",
            ) from error
        finally:
            path.unlink(missing_ok=True)  # the mapping keeps it; nothing is left behind
        return flat.view(shape)

    def get(self, index: Sequence[int]) -> States:
        """States of some sequences, padded to the longest (padding rows are zero)."""
        sequences = [self._sequences[i] for i in index]
        length = max(len(sequence.tokens) for sequence in sequences)
        out = torch.zeros((len(index), length, self.width), dtype=torch.bfloat16)
        for row, (number, sequence) in enumerate(zip(index, sequences, strict=True)):
            count = len(sequence.tokens)
            place = self._place.get(number)
            if place is None:
                out[row, :count] = self._compute(number, sequence)
            else:
                out[row, :count] = self._store[place : place + count]
                self.reused += count
        split = self.width - self._target.hidden
        return States(out[..., :split], out[..., split:])

    def _compute(self, number: int, sequence: TokenSequence) -> torch.Tensor:
        """Run the target over one sequence, and keep its states while there is room.

        One at a time: what a sequence's states round to must not depend on its neighbours in a
        batch, or a resumed run would not repeat what the cache once held.
        """
        count = len(sequence.tokens)
        tokens = torch.from_numpy(sequence.tokens[None].astype(np.int64))
        states = self._target.states(tokens.to(self._target.head.device), self._layer_ids)
        made = torch.cat([states.layers[0], states.final[0]], dim=-1).to("cpu", torch.bfloat16)
        self.computed += count
        if number not in self._place and self._used + count <= self.capacity:
            self._store[self._used : self._used + count] = made
            self._place[number] = self._used
            self._used += count
        return made
