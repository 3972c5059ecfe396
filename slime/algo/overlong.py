"""DAPO's soft penalty for responses that come close to the length limit (arXiv:2503.14476, section 3.4, eq. 13).

- Used by: `megatron.advantages` adds it to the rewards that estimators read.
- Invariant: a response shorter than `max_length - buffer` has no penalty, and no penalty is larger than the factor.
"""

from __future__ import annotations

from torch import Tensor


def overlong_penalties(response_lengths_N: Tensor, *, max_length: int, buffer: int, factor: float) -> Tensor:
    """Return the penalty of each sample, [N] float64, 0 or less.

    It is factor x ((max_length - buffer) - length) / buffer inside the buffer and -factor beyond it. With max_length
    100, buffer 20 and factor 1, a response of 80 tokens gets 0, one of 90 gets -0.5, one of 100 or more gets -1.

    Args:
        response_lengths_N: in tokens, like `max_length` (L_max in the paper) and `buffer` (L_cache).
    """
    over_N = (response_lengths_N - (max_length - buffer)).double()
    return -factor * (over_N / buffer).clamp(0, 1)
