"""Attention of one new token in each row over the cache, in blocks of one size.

- Called by: `Model.decode_in_blocks`, for each layer.
- Invariant: a row's result is a sum over blocks in their order, each of one shape whatever the length of the other
  rows. Blocks after the row's position add exactly 0.

Shapes: Z (rows x key/value heads), Q query heads of one key/value head, D channels of a head, J blocks of W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.config.memory import EMBEDDED_ROW_STEP

BLOCK = EMBEDDED_ROW_STEP
"""The block size in positions, so that whole blocks are in the cache."""


def blocks_mask(positions_B: Tensor, *, groups: int, per_group: int) -> Tensor:
    """Return [J, Z, Q, W] with 0 where a row may attend and -inf where it may not; J blocks cover the longest row."""
    count = int(positions_B.max()) // BLOCK + 1
    places = torch.arange(count * BLOCK).view(count, 1, BLOCK)
    future = (places > positions_B[None, :, None])[:, :, None, None]  # [J, B, 1, 1, W]
    mask = torch.zeros(count, len(positions_B), 1, 1, BLOCK).masked_fill_(future, float("-inf"))
    shape = (count, len(positions_B), groups, per_group, BLOCK)
    return mask.expand(shape).reshape(count, -1, per_group, BLOCK)


def attend_in_blocks(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend: q [Z, Q, D], keys and values [Z, J * W, D], mask of `blocks_mask` -> [Z, Q, D]; softmax in fp32."""
    scale = q.shape[-1] ** -0.5
    scores = torch.empty_like(mask)  # [J, Z, Q, W]
    for block, score, hidden in zip(keys.split(BLOCK, dim=1), scores, mask, strict=True):
        if q.dtype == torch.float32:
            torch.baddbmm(hidden, q, block.transpose(1, 2), alpha=scale, out=score)
        else:
            torch.add(hidden, torch.bmm(q, block.transpose(1, 2)), alpha=scale, out=score)
    mass = scores.sub_(scores.amax(dim=(0, 3), keepdim=True)).exp_()
    # The first block always counts; cumsum adds block after block in their order.
    total = mass.sum(dim=-1, keepdim=True).cumsum(dim=0)[-1]
    weighted = torch.zeros(q.shape, dtype=torch.float32)
    for block, weight in zip(values.split(BLOCK, dim=1), mass, strict=True):
        weighted += torch.bmm(weight.to(block.dtype), block)
    return weighted.div_(total).to(q.dtype)
