"""Gumbel noise from a counter, on the device.

``gumbel(seed, position, token) = -log(-log(u))`` with ``u = h / (2^32 - 1)`` and ``h`` the 32-bit
MurmurHash3 (Appleby, public domain; seed 0) of the sixteen bytes ``(seed low, seed high, position,
token)``, four little-endian words. Adding it to logits and taking the argmax draws from their
softmax (the Gumbel-max trick), and the draw at a position depends on nothing but its keys.

In float32 ``u`` would round to 1 for the 128 largest hashes, which are the ones that win. So above
``u = 3/4`` the kernel works with ``x = 1 - u``, exact from ``~h``, and
``-log(1 - x) = 2 artanh(x / (2 - x))`` by its series; the noise is within 2e-6 of float64's
everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scramble(word):
    word = word * 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    return word * 0x1B873593


@triton.jit
def _absorb(state, scrambled):
    state = state ^ scrambled
    state = (state << 13) | (state >> 19)
    return state * 5 + 0xE6546B64


@triton.jit
def row_state(seed, position):
    """Hash state after the words a row shares: its seed's halves and its position (uint32)."""
    low = _scramble((seed & 0xFFFFFFFF).to(tl.uint32))
    high = _scramble(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _absorb(low ^ low, low)
    state = _absorb(state, high)
    return _absorb(state, _scramble((position & 0xFFFFFFFF).to(tl.uint32)))


@triton.jit
def gumbel(state, token):
    """Noise float32 of tokens under row states; the two are broadcast against each other."""
    word = _absorb(state, _scramble(token.to(tl.uint32))) ^ 16
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return noise_of(word ^ (word >> 16))


@triton.jit
def noise_of(word):
    """Noise float32 of hashes (uint32)."""
    high = word >= 0xC0000000
    # One conversion serves both branches: 1 - u above 3/4, u below, in units of 2^-32.
    value = tl.where(high, word ^ 0xFFFFFFFF, word).to(tl.float32) * 2.3283064370807974e-10
    ratio = value / (2.0 - value)
    square = ratio * ratio
    series = 1.0 / 9.0 + square * (1.0 / 11.0)
    series = 1.0 / 5.0 + square * (1.0 / 7.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * series)
    # The largest hash is u = 1 exactly; its -log is capped at the hash's spacing.
    tail = tl.maximum(2.0 * ratio * series, 2.3283064365386963e-10)
    # Hash 0 is u = 0 exactly: -log(-log(smallest double)) keeps the noise finite, as float64 does.
    body = -tl.log(tl.maximum(value, 1.0e-30))
    noise = -tl.log(tl.where(high, tail, body))
    return tl.where(word == 0, -709.782712893384, noise)
