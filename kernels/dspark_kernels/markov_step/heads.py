"""Latents of gated and rnn heads for all rows of one step.

With ``c = W_h h + bias`` from ``project`` (all steps at once, before the first token is known)::

    gated:  l = sigmoid(c + W_e e) * e
    rnn:    (g, a, o) = c + W_s s + W_e e,   s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(a),   l = tanh(o)

where ``e = W1[previous]``. Products accumulate in float32; latents are rounded to the type of the
weights, which is what ``scan`` multiplies with W2, and states stay in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.markov_step.arithmetic import product, sigmoid, tanh
from dspark_kernels.markov_step.kernel import predecessor


@triton.jit(do_not_specialize=["rows"])
def project(
    hidden,
    weight,
    bias,
    context,
    rows,
    width,
    outputs,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``context = hidden @ weight^T + bias`` in float32. Grid (output blocks, row blocks).

    ``hidden`` [rows, width]; ``weight`` [outputs, width], the columns of the joint weight that meet
    the hidden state; ``context`` [rows, outputs].
    """
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    row_in, output_in = row < rows, output < outputs
    total = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    hidden_row = hidden + row.to(tl.int64) * width
    weight_row = weight + output.to(tl.int64) * weight_stride
    for start in range(0, width, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        inner_in = inner < width
        x = tl.load(hidden_row[:, None] + inner[None, :], row_in[:, None] & inner_in[None, :], 0.0)
        w = tl.load(
            weight_row[None, :] + inner[:, None], inner_in[:, None] & output_in[None, :], 0.0
        )
        total += product(x.to(w.dtype), w, PRECISION)
    total += tl.load(bias + output, output_in, 0.0).to(tl.float32)[None, :]
    both = row_in[:, None] & output_in[None, :]
    tl.store(context + row.to(tl.int64)[:, None] * outputs + output[None, :], total, both)


@triton.jit
def _part(
    left,
    entry,
    inside,
    weight,
    weight_stride,
    output,
    output_in,
    total,
    RANK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ``left[entry] @ weight[output]^T`` to ``total``."""
    left_row = left + entry * RANK
    weight_row = weight + output.to(tl.int64) * weight_stride
    for start in range(0, RANK, BLOCK_I):
        inner = start + tl.arange(0, BLOCK_I)
        known = inner < RANK
        x = tl.load(left_row[:, None] + inner[None, :], inside[:, None] & known[None, :], 0.0)
        w = tl.load(weight_row[None, :] + inner[:, None], known[:, None] & output_in[None, :], 0.0)
        total += product(x.to(w.dtype), w, PRECISION)
    return total


@triton.jit(do_not_specialize=["rows", "step", "chunks", "has_state"])
def latent(
    w1,
    weight_state,
    weight_embedded,
    context,
    state,
    anchors,
    stats,
    chosen,
    latents,
    states,
    rows,
    step,
    chunks,
    has_state,
    weight_stride,
    context_stride,
    RANK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RECURRENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Latents (and states) of one step. Grid (blocks of the rank, row blocks).

    ``context`` is this step's, rows ``context_stride`` apart; ``stats`` and ``chosen`` are those of
    ``scan`` with ``chunks`` chunks, read from step 1 on; ``state`` is read where ``has_state``.
    """
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    output = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    output_in = output < RANK
    both = inside[:, None] & output_in[None, :]
    entry = predecessor(anchors, stats, chosen, row, inside, rows, chunks, step, BLOCK_B)
    context_row = context + row.to(tl.int64)[:, None] * context_stride
    at = row[:, None] * RANK + output[None, :]
    if RECURRENT:
        remembers = inside & (has_state != 0)
        gates = tl.load(context_row + output[None, :], both, 0.0)
        inputs = tl.load(context_row + RANK + output[None, :], both, 0.0)
        outputs = tl.load(context_row + 2 * RANK + output[None, :], both, 0.0)
        own = row.to(tl.int64)
        candidate = output + RANK
        shown = output + 2 * RANK
        gates = _part(w1, entry, inside, weight_embedded, weight_stride, output, output_in, gates, RANK, BLOCK_I, PRECISION)  # fmt: skip
        gates = _part(state, own, remembers, weight_state, weight_stride, output, output_in, gates, RANK, BLOCK_I, PRECISION)  # fmt: skip
        inputs = _part(w1, entry, inside, weight_embedded, weight_stride, candidate, output_in, inputs, RANK, BLOCK_I, PRECISION)  # fmt: skip
        inputs = _part(state, own, remembers, weight_state, weight_stride, candidate, output_in, inputs, RANK, BLOCK_I, PRECISION)  # fmt: skip
        outputs = _part(w1, entry, inside, weight_embedded, weight_stride, shown, output_in, outputs, RANK, BLOCK_I, PRECISION)  # fmt: skip
        outputs = _part(state, own, remembers, weight_state, weight_stride, shown, output_in, outputs, RANK, BLOCK_I, PRECISION)  # fmt: skip
        gate = sigmoid(gates)
        held = tl.load(state + at, both & remembers[:, None], 0.0)
        tl.store(states + at, gate * held + (1.0 - gate) * tanh(inputs), both)
        result = tanh(outputs)
    else:
        gates = tl.load(context_row + output[None, :], both, 0.0)
        gates = _part(w1, entry, inside, weight_embedded, weight_stride, output, output_in, gates, RANK, BLOCK_I, PRECISION)  # fmt: skip
        embedded = tl.load(w1 + entry[:, None] * RANK + output[None, :], both, 0.0)
        result = sigmoid(gates) * embedded.to(tl.float32)
    tl.store(latents + at, result.to(latents.dtype.element_ty), both)
