"""Small tokenizers with chat templates of the kinds that targets have: one token a byte."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: SmolLM2's own template: a default system message.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Like Llama 3: BOS in the template, contents trimmed.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
#: Like Gemma 2: no system message, another name for the assistant.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
#: Like Qwen3: the thinking of turns before the last question is dropped.
QWEN3 = (
    "{% set last = namespace(user=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and loop.index0 < last.user %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = {
    CHATML: ("<|im_end|>", "<|im_end|>", ("<|im_start|>",)),
    QWEN3: ("<|im_end|>", "<|im_end|>", ("<|im_start|>",)),
    LLAMA3: ("<|begin|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    # The end of a turn is neither EOS nor has another role of its own, as in Gemma 3.
    GEMMA: ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
}


def tokenizer(template: str) -> Any:
    """A tokenizer of one token a byte, and those that the template is made of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bos, eos, others = _SPECIAL[template]
    core.add_special_tokens([AddedToken(name, special=True) for name in others])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made
