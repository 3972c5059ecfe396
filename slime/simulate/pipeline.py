"""The time of a pipeline's schedule (1F1B) for micro-batches of any cost.

- Used by: `trainers`, for the seconds of an optimizer step, and `bench.packing`.
- Invariant: micro-batches of equal cost take (M + P - 1) / M times their sum over the stages, which is the schedule's
  known bubble.

Shapes: _R pipelines (data-parallel ranks), _M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FORWARD = 1 / 3
"""The cost of a forward pass, as a share of forward and backward."""


def pipeline_time(costs: Sequence[float], stages: int, *, parts: int = 1) -> float:
    """Return the seconds of a pipeline in which each stage takes `costs` seconds, forward and backward, a micro-batch.

    With one stage that is their sum. With `parts` model parts on each stage (virtual stages) the time that the pipeline
    waits is divided by their number.

    Two stages, micro-batches of 3 seconds (1 forward, 2 backward) and of 6:

    >>> pipeline_time([3.0, 6.0], 2)  # the second stage: from 1 to 4, then to 10; the first: backward until 14
    14.0
    """
    return float(pipeline_times([costs], stages, parts=parts)[0])


def pipeline_times(costs: Sequence[Sequence[float]], stages: int, *, parts: int = 1) -> NDArray[np.float64]:
    """Return `pipeline_time` of each of several pipelines with the same number of micro-batches."""
    costs_RM = np.asarray(costs, dtype=np.float64)
    totals_R = costs_RM.sum(1)
    if stages == 1:
        return totals_R
    return totals_R + (_last_backward(costs_RM, stages) - totals_R) / parts


def _last_backward(costs_RM: NDArray[np.float64], stages: int) -> NDArray[np.float64]:
    """Return the end of each pipeline's schedule without virtual stages.

    Stage s first runs `stages - 1 - s` forward passes, then one forward and one backward pass in turns, then the
    backward passes that are left. A forward pass waits for that of the stage before, a backward pass for that of the
    stage after. All pipelines have this order, so their times are computed at once.
    """
    count = costs_RM.shape[1]
    orders = [_order(min(stages - 1 - stage, count), count) for stage in range(stages)]
    done: list[dict[tuple[bool, int], NDArray[np.float64]]] = [{} for _ in range(stages)]
    clocks = [np.zeros(len(costs_RM)) for _ in range(stages)]
    left = sum(map(len, orders))
    while left:
        for stage, order in enumerate(orders):
            while len(done[stage]) < len(order):
                forward, number = step = order[len(done[stage])]
                neighbour = stage - 1 if forward else stage + 1
                if 0 <= neighbour < stages:
                    if step not in done[neighbour]:
                        break
                    clocks[stage] = np.maximum(clocks[stage], done[neighbour][step])
                clocks[stage] = clocks[stage] + costs_RM[:, number] * (FORWARD if forward else 1 - FORWARD)
                done[stage][step] = clocks[stage]
                left -= 1
    return np.max(clocks, axis=0)


def _order(warm_up: int, count: int) -> list[tuple[bool, int]]:
    """Return a stage's passes: (True, number) is a forward pass of a micro-batch, (False, number) its backward pass."""
    turns = [step for number in range(count - warm_up) for step in ((True, number + warm_up), (False, number))]
    first, last = range(warm_up), range(count - warm_up, count)
    return [(True, number) for number in first] + turns + [(False, number) for number in last]
