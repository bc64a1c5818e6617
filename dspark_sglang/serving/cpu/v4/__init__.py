"""DeepSeek-V4 on ordinary CPU cores: torch in place of the functions of SGLang that launch kernels.

SGLang's own V4 model, pools, metadata and scheduler run; what they call in the end (a *leaf*) is replaced by
torch that keeps the kernel's contract: same operands, same bytes in the caches, same result up to rounding. One
module a family: ``pages`` (cache formats), ``rotary``, ``attention``, ``indexer``, ``compressor``, ``streams``
(hyper-connections), ``experts``. ``install`` says what replaces what; ``sources`` pins what it was written from.

Loaded only where the target is a DeepSeek-V4.
"""
