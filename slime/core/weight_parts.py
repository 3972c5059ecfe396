"""WeightPart: the part of the weights that one trainer, or a few tensor-parallel ones, can stream by themselves.

- Used by: `megatron.model.hf_weights` makes them, and `sync.owners` sends each from the trainer that owns it.
- Invariant: the parts that are sent hold every tensor of the model exactly once. The last turn's part is never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightPart:
    """The experts of one expert rank of a pipeline stage, or all other weights of a pipeline stage.

    `tensors` streams them, whole and by HF name. The stream is collective over the ranks that hold shards of the same
    tensors (tensor or expert tensor parallelism), and over no others.
    """

    turn: int
    """The turn in which it is sent; the owner's peers stream it in the same turn."""
    num_turns: int
    """The number of turns of the whole model."""
    sent: bool
    """Whether this trainer is the owner, which sends it; replicas and tensor-parallel peers only stream it."""
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
