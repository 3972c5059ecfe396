"""DAPO's soft punishment of responses that come near their limit (arXiv:2503.14476, section 3.4, eq. 13).

Path: `megatron.rollout_columns` adds it to the rewards that estimators read. Invariant: a response that leaves the
buffer untouched is not punished, and none is by more than the factor.

Shapes: _N samples.
"""

from __future__ import annotations

from torch import Tensor


def overlong_penalties(response_lengths_N: Tensor, *, max_length: int, buffer: int, factor: float) -> Tensor:
    """[N] float64, 0 or less: factor x ((max_length - buffer) - length) / buffer within the buffer, -factor behind it.

    Args:
        response_lengths_N: in tokens, as `max_length` (L_max) and `buffer` (L_cache) are.
    """
    over_N = (response_lengths_N - (max_length - buffer)).double()
    return -factor * (over_N / buffer).clamp(0, 1)
