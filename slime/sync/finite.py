"""A check that a set of weights is finite, made while it is streamed to the engines.

- Where it sits: a trainer passes the stream of whole tensors (`megatron.model.hf_weights.iter_hf_tensors`) through
  here on its way to a transport.
- Invariant: a set with a value that is not finite never reaches its end. So its last bucket, which carries the policy
  version, is never sent, and no engine reports that it holds such a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from slime.core.errors import RunError
from slime.engine.bucket_layout import NamedTensor

NAMED = 4
"""The number of weights that the error lists; it counts the rest."""
COUNTED_AT_ONCE = 2**24
"""The number of values that are counted together, because counting needs memory for copies."""


def finite(tensors: Callable[[], Iterable[NamedTensor]], *, described: Callable[[], str]) -> Iterator[NamedTensor]:
    """Yield `tensors()`, and raise at its end if a value is NaN or infinite.

    Each tensor costs one reduction on its device (its least and greatest value). The results stay there until the
    stream has ended, so the host waits for the device once and not once for each tensor.

    It is collective if torch.distributed is initialized: all ranks iterate to the end, and all raise if one has found
    something, because another data-parallel rank may hold weights that this one does not send. Only then are the
    tensors streamed a second time, to count the values.

    Args:
        tensors: starts the stream, with the same tensors every time.
        described: returns what the weights are and their source, as the beginning of the error.

    Raises:
        RunError: naming weights that are not finite, with the number of their values that are not.
    """
    check = FiniteCheck(tensors, described=described)
    yield from check.watched(tensors())
    check.finish()


class FiniteCheck:
    """The check of `finite` for weights that are streamed in parts: all parts are watched, then it is finished once."""

    def __init__(self, tensors: Callable[[], Iterable[NamedTensor]], *, described: Callable[[], str]) -> None:
        """`tensors` streams all parts again, and `described` is as for `finite`."""
        self._tensors = tensors
        self._described = described
        self._extremes: list[Tensor] = []

    def watched(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Yield the tensors of one part."""
        for name, tensor in tensors:
            if tensor.is_floating_point() and tensor.numel():
                self._extremes += torch.aminmax(tensor.detach())  # both are NaN if a value is
            yield name, tensor

    def finish(self) -> None:
        """Raise RunError on all ranks if one of them has watched a value that is not finite; collective."""
        if _anywhere(self._extremes):
            raise RunError(_message(_gathered(_count(self._tensors())), self._described()))


def _anywhere(extremes: list[Tensor]) -> bool:
    """Return whether one of `extremes` is not finite, on any rank."""
    if not extremes:
        return False
    found = (~torch.stack([extreme.float() for extreme in extremes]).isfinite()).any().int()
    if _has_peers():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def _count(tensors: Iterable[NamedTensor]) -> dict[str, tuple[int, int]]:
    """Return {name: (values that are not finite, all values)} for the tensors with such values."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors:
        parts = tensor.detach().reshape(-1).split(COUNTED_AT_ONCE)
        bad = sum(int((~part.isfinite()).sum()) for part in parts)
        if bad:
            found[name] = (bad, tensor.numel())
    return found


def _gathered(found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the findings of all ranks; for a weight on several ranks, those of the first."""
    if not _has_peers():
        return found
    of_ranks: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    together: dict[str, tuple[int, int]] = {}
    for of_rank in reversed(of_ranks):
        together |= of_rank
    return together


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _message(found: dict[str, tuple[int, int]], described: str) -> str:
    listed = [f"{name} ({bad} of {total} values)" for name, (bad, total) in list(found.items())[:NAMED]]
    more = f", and {len(found) - NAMED} more weights" if len(found) > NAMED else ""
    return (
        f"{described}: {len(found)} {'weight is' if len(found) == 1 else 'weights are'} not finite (NaN or infinity): "
        f"{', '.join(listed)}{more}. Engines that held them could generate nothing. Load a checkpoint whose weights "
        "are finite (--ckpt-step names an earlier one of --load); if training has made them, lower --lr or --clip-grad"
    )
