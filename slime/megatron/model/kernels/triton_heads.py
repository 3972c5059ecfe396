"""One tile of heads on a GPU: RMSNorm and RoPE of each head, and the way back, for the kernels of `triton_qkv`.

- Used by: `triton_qkv`, whose kernels call these functions of Triton for queries and for keys.
- Invariant: everything between load and store is float32.

A tile has HEADS heads, [HEADS, 1] pointers to their first channels. A head has D channels: HALF pairs that rotate, and
D - 2 x HALF others. PAIRS and REST are the next powers of 2, and REST is 0 if all channels rotate.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(place, some, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Load both channels of each pair, [HEADS, PAIRS] each; `place` has the first channel of each head, [HEADS, 1]."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(place + channels, mask=some & (channels < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    else:
        channels = tl.arange(0, PAIRS)[None, :]
        here = some & (channels < HALF)
        first = tl.load(place + channels, mask=here, other=0.0).to(tl.float32)
        second = tl.load(place + HALF + channels, mask=here, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    place, first, second, some, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr
):
    dtype = place.dtype.element_ty
    if INTERLEAVED:
        channels = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(first, second), (HEADS, 2 * PAIRS))
        tl.store(place + channels, x.to(dtype), mask=some & (channels < 2 * HALF))
    else:
        channels = tl.arange(0, PAIRS)[None, :]
        here = some & (channels < HALF)
        tl.store(place + channels, first.to(dtype), mask=here)
        tl.store(place + HALF + channels, second.to(dtype), mask=here)


@triton.jit
def turn(
    source,
    out,
    some,
    weight_ptr,
    cos,
    sin,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Norm and rotate heads at `source` [HEADS, 1] into `out` [HEADS, 1]."""
    first, second = load_pairs(source, some, HALF, INTERLEAVED, HEADS, PAIRS)
    if REST > 0:
        others = 2 * HALF + tl.arange(0, REST)[None, :]
        left = some & (others < D)
        rest = tl.load(source + others, mask=left, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        rstd = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        weight1, weight2 = load_pairs(
            weight_ptr + tl.zeros([1, 1], tl.int32), tl.full([1, 1], 1, tl.int1), HALF, INTERLEAVED, 1, PAIRS
        )
        first = first * rstd * weight1
        second = second * rstd * weight2
        if REST > 0:
            rest = rest * rstd * tl.load(weight_ptr + others, mask=others < D, other=0.0).to(tl.float32)
    store_pairs(out, first * cos - second * sin, second * cos + first * sin, some, HALF, INTERLEAVED, HEADS, PAIRS)
    if REST > 0:
        tl.store(out + others, rest.to(out.dtype.element_ty), mask=left)


@triton.jit
def turn_back(
    gradient,
    source,
    out,
    some,
    weight_ptr,
    cos,
    sin,
    eps,
    of_first,
    of_second,
    of_rest,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Write the gradient of heads at `source` to `out`, and return the sums of the weight's gradient, with theirs."""
    turned1, turned2 = load_pairs(gradient, some, HALF, INTERLEAVED, HEADS, PAIRS)
    of1 = turned1 * cos + turned2 * sin  # the rotation by the negative angle
    of2 = turned2 * cos - turned1 * sin
    if REST > 0:
        others = 2 * HALF + tl.arange(0, REST)[None, :]
        left = some & (others < D)
        of3 = tl.load(gradient + others, mask=left, other=0.0).to(tl.float32)
    if NORM:
        first, second = load_pairs(source, some, HALF, INTERLEAVED, HEADS, PAIRS)
        weight1, weight2 = load_pairs(
            weight_ptr + tl.zeros([1, 1], tl.int32), tl.full([1, 1], 1, tl.int1), HALF, INTERLEAVED, 1, PAIRS
        )
        squares = tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            rest = tl.load(source + others, mask=left, other=0.0).to(tl.float32)
            weight3 = tl.load(weight_ptr + others, mask=others < D, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)
        rstd = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        # d x = (g w - normed * mean(g w normed)) / rms
        first = first * rstd
        second = second * rstd
        of_first += of1 * first
        of_second += of2 * second
        of1 = of1 * weight1
        of2 = of2 * weight2
        products = tl.sum(of1 * first + of2 * second, axis=1)
        if REST > 0:
            rest = rest * rstd
            of_rest += of3 * rest
            of3 = of3 * weight3
            products += tl.sum(of3 * rest, axis=1)
        mean = (products / D)[:, None]
        of1 = (of1 - first * mean) * rstd
        of2 = (of2 - second * mean) * rstd
        if REST > 0:
            of3 = (of3 - rest * mean) * rstd
    store_pairs(out, of1, of2, some, HALF, INTERLEAVED, HEADS, PAIRS)
    if REST > 0:
        tl.store(out + others, of3.to(out.dtype.element_ty), mask=left)
    return of_first, of_second, of_rest


@triton.jit
def store_sums(
    place,
    of_first,
    of_second,
    of_rest,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Store the gradient of one weight, [D], from its sums for each head of a tile."""
    place = place + tl.zeros([1, 1], tl.int32)
    every = tl.full([1, 1], 1, tl.int1)
    first, second = tl.sum(of_first, axis=0)[None, :], tl.sum(of_second, axis=0)[None, :]
    store_pairs(place, first, second, every, HALF, INTERLEAVED, 1, PAIRS)
    if REST > 0:
        others = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(place + others, tl.sum(of_rest, axis=0)[None, :], mask=others < D)
