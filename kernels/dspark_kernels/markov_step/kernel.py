"""Full-vocabulary drafting: one pass over the vocabulary a step, one launch a step.

For step ``k`` and row ``b`` with previous token ``x`` and latent ``l = latent(x, h, s)``::

    z(v)     = base[b, k, v] + sum_i W2[v, i] l[i]          (rounded to base's type if recorded)
    score(v) = z(v)                                          greedy rows (temperature <= 0)
             = z(v) / T + gumbel(seed, position + k, v)      sampled rows
    token    = first argmax of score
    lse      = log sum_v exp(z(v) / T)

``scan`` cuts V into chunks, a program each, and all rows (up to BLOCK_B) share its reading of W2:
the bias is a matrix product ``W2[chunk] @ latents^T`` that exists only in registers. A program
leaves five numbers a row: best score, its token, that token's logit, largest scaled logit and sum
of exponentials. No program waits for another: the *next* launch starts by taking the best of the
chunk scores, which every program does for itself (chunks are in token order, so the first of equal
chunks holds the lowest token), and ``finish`` reduces all steps' log-sum-exps at the end, in
chunk order.

For gated and rnn heads ``latent`` runs before each ``scan``: its weights are up to ``3r x 2r``, too
much for every program of ``scan`` to read again. Their product with the hidden states does not
depend on drafted tokens and is taken for all steps at once by ``project``.

NaN logits compete as +inf, so a token is always inside the vocabulary, and make the row's
log-sum-exp NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.markov_step.arithmetic import product
from dspark_kernels.markov_step.noise import gumbel, row_state


@triton.jit
def _last_index():
    return 2147483647


@triton.jit
def winner(scores, tokens, row, inside, rows, chunks, BLOCK_B: tl.constexpr):
    """Token of the best chunk of each row, the first among equals. ``scores`` [chunks, rows]."""
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, chunks, 16):
        chunk = start + tl.arange(0, 16)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        found = tl.load(scores + chunk[:, None] * rows + row[None, :], mask, float("-inf"))
        top = tl.max(found, 0)
        first = tl.min(tl.where(found == top[None, :], chunk[:, None], _last_index()), 0)
        better = top > best
        best = tl.where(better, top, best)
        where = tl.where(better, first, where)
    return tl.load(tokens + where * rows + row, inside, 0), where


@triton.jit
def predecessor(anchors, stats, chosen, row, inside, rows, chunks, step, BLOCK_B: tl.constexpr):
    """int64 token before ``step``: the anchor, or the winner of the step before."""
    token = tl.load(anchors + row, inside, 0)
    if step > 0:
        before = (step - 1) * chunks * rows
        drafted, _ = winner(stats + 4 * before, chosen + before, row, inside, rows, chunks, BLOCK_B)
        token = drafted.to(tl.int64)
    return token


@triton.jit
def _best(score, z, both, column):
    """Best score of each row of a tile [columns, rows], its column and its logit."""
    score = tl.where(both, score, float("-inf"))
    top = tl.max(score, 0)
    ties = both & (score == top[None, :])
    at = tl.min(tl.where(ties, column[:, None], _last_index()), 0)
    # Exact: all other lanes add zero. Keeps a NaN logit NaN.
    return top, at, tl.sum(tl.where(column[:, None] == at[None, :], z, 0.0), 0)


@triton.jit
def _sum_exp(scaled, both, peak, mass):
    """Take a tile into the running maximum and sum of exponentials below it."""
    top = tl.maximum(peak, tl.max(tl.where(both, scaled, float("-inf")), 0))
    # All -inf so far: any finite shift gives exp(-inf) = 0.
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.where(both, tl.exp(scaled - shift[None, :]), 0.0)
    return top, mass * tl.exp(peak - shift) + tl.sum(weights, 0)


@triton.jit
def _kept(recorded, row, drawn, RECORD: tl.constexpr):
    """Rows whose step logits are stored, of those that are sampled."""
    if RECORD == 2:
        drawn = drawn & (tl.load(recorded + row, drawn, 0) != 0)
    return drawn


@triton.jit
def _perturb(z, score, both, name, state, drawn, scale, peak, mass):
    """Scores of sampled rows with temperature and noise, and their sum of exponentials so far."""
    noisy = tl.max(drawn.to(tl.int32), 0) > 0
    # A block of greedy rows only needs neither noise nor exponentials.
    if noisy:
        noise = gumbel(state[None, :], name.to(tl.int32)[:, None])
        score = tl.where(drawn[None, :], score * scale[None, :] + noise, score)
        peak, mass = _sum_exp(z * scale[None, :], both, peak, mass)
    return score, peak, mass


@triton.jit
def draws(temperatures, row, inside):
    """Which rows are sampled, and what their logits are multiplied by (1 for the others)."""
    temperature = tl.load(temperatures + row, inside, 0.0)
    drawn = temperature > 0
    return drawn, 1.0 / tl.where(drawn, temperature, 1.0)


@triton.jit
def _bias(w2, name, valid, latent, RANK: tl.constexpr, RANK_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``W2[name] @ latent``: [columns, rows] float32."""
    rank = tl.arange(0, RANK_PAD)[None, :]
    weight = tl.load(w2 + name[:, None] * RANK + rank, valid & (rank < RANK), 0.0)
    return product(weight, latent, PRECISION)


@triton.jit
def _leave(stats, plane, size, at, first, second, inside):
    """Store two of a chunk's numbers in planes ``plane`` and ``plane + 1`` of ``size`` each."""
    tl.store(stats + plane * size + at, first, inside)
    tl.store(stats + (plane + 1) * size + at, second, inside)


@triton.jit(do_not_specialize=["step", "tiles", "rows"])
def scan(
    base,
    out,
    w2,
    table,
    anchors,
    vocabulary,
    temperatures,
    seeds,
    positions,
    recorded,
    stats,
    chosen,
    rows,
    columns,
    step,
    tiles,
    base_stride,
    out_stride,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
    SAMPLED: tl.constexpr,
    RECORD: tl.constexpr,
    MAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step. Grid (row blocks, chunks): row blocks of one chunk run together and share L2.

    ``base``/``out`` [rows, columns] of this step; ``stats`` [steps, 4, chunks, rows] float32;
    ``chosen`` [steps, chunks, rows] int32; ``tiles`` of BLOCK_V columns a chunk. ``table`` is W1
    (GATHER) or the latents themselves. RECORD: 0 nothing is stored over ``out``, 1 every sampled
    row is, 2 those of them that ``recorded`` names.
    """
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    entry = row.to(tl.int64)
    if GATHER:
        entry = predecessor(anchors, stats, chosen, row, inside, rows, chunks, step, BLOCK_B)
    rank = tl.arange(0, RANK_PAD)[None, :]
    latent = tl.load(table + entry[:, None] * RANK + rank, inside[:, None] & (rank < RANK), 0.0)
    if SAMPLED:
        drawn, scale = draws(temperatures, row, inside)
        state = row_state(
            tl.load(seeds + row, inside, 0), tl.load(positions + row, inside, 0) + step
        )
        kept = _kept(recorded, row, inside & drawn, RECORD)

    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    token = tl.zeros([BLOCK_B], tl.int32)
    logit = tl.zeros([BLOCK_B], tl.float32)
    peak = tl.full([BLOCK_B], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_B], tl.float32)
    base += row.to(tl.int64)[None, :] * base_stride
    out += row.to(tl.int64)[None, :] * out_stride
    last_tile = tl.minimum((chunk + 1) * tiles, tl.cdiv(columns, BLOCK_V))
    for tile in tl.range(chunk * tiles, last_tile, num_stages=STAGES):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        valid = (column < columns)[:, None]
        name = column.to(tl.int64)
        if MAPPED:
            name = tl.load(vocabulary + column, column < columns, 0)
        both = valid & inside[None, :]
        z = tl.load(base + column[:, None], both, float("-inf")).to(tl.float32)
        z += _bias(w2, name, valid, tl.trans(latent), RANK, RANK_PAD, PRECISION)
        if RECORD != 0:
            rounded = z.to(out.dtype.element_ty)
            tl.store(out + column[:, None], rounded, valid & kept[None, :])
            z = tl.where(kept[None, :], rounded.to(tl.float32), z)
        score = tl.where(z != z, float("inf"), z)
        if SAMPLED:
            score, peak, mass = _perturb(z, score, both, name, state, drawn, scale, peak, mass)
        top, at, picked = _best(score, z, both, column)
        # The first tile is always taken, so a row of -inf only still names its first token.
        better = (top > best) | (tile == chunk * tiles)
        best = tl.where(better, top, best)
        token = tl.where(better, at, token)
        logit = tl.where(better, picked, logit)
    if MAPPED:
        token = tl.load(vocabulary + token, inside, 0).to(tl.int32)
    at = chunk * rows + row
    tl.store(chosen + step * chunks * rows + at, token, inside)
    _leave(stats, step * 4, chunks * rows, at, best, logit, inside)
    if SAMPLED:
        _leave(stats, step * 4 + 2, chunks * rows, at, peak, mass, inside)


@triton.jit(do_not_specialize=["rows", "steps", "chunks"])
def finish(
    stats,
    chosen,
    anchors,
    temperatures,
    tokens,
    previous,
    logits,
    lses,
    rows,
    steps,
    chunks,
    BLOCK_B: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """Reduce the chunks of every step. Grid (row blocks, steps); outputs are [rows, steps]."""
    step = tl.program_id(1)
    plane = chunks * rows
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    stats += step * 4 * plane
    token, where = winner(stats, chosen + step * plane, row, inside, rows, chunks, BLOCK_B)
    token = token.to(tl.int64)
    at = row.to(tl.int64) * steps + step
    tl.store(tokens + at, token, inside)
    tl.store(previous + at + 1, token, inside & (step + 1 < steps))
    if step == 0:
        tl.store(previous + at, tl.load(anchors + row, inside, 0), inside)
    tl.store(logits + at, tl.load(stats + plane + where * rows + row, inside, 0.0), inside)
    lse = tl.zeros([BLOCK_B], tl.float32)
    if SAMPLED:
        peak = tl.full([BLOCK_B], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, chunks, 16):
            chunk = start + tl.arange(0, 16)
            mask = (chunk < chunks)[:, None] & inside[None, :]
            part = stats + 2 * plane + chunk[:, None] * rows + row[None, :]
            peaks = tl.load(part, mask, float("-inf"))
            masses = tl.load(part + plane, mask, 0.0)
            top = tl.maximum(peak, tl.max(peaks, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            mass = mass * tl.exp(peak - shift) + tl.sum(masses * tl.exp(peaks - shift[None, :]), 0)
            peak = top
        lse = tl.where(tl.load(temperatures + row, inside, 0.0) > 0, peak + tl.log(mass), 0.0)
    tl.store(lses + at, lse, inside)
