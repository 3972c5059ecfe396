"""The KV cache: one row for each running request, all layers in one buffer; optionally the experts of tokens.

- Called by: `Model.prefill` and `Model.decode` write and read it; `scheduler` assigns, moves and copies its rows.
- Invariant: exactly the rows [0, running) are in use, so decoding reads a plain slice.

The operating system provides memory page by page as tokens are written. A row reserves room for the longest request,
and a short request never touches most of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slime.config.memory import EMBEDDED_ROW_STEP
from slime.core.architecture import Architecture

ALIGNMENT = 64
"""Alignment in bytes, like torch's own: it may decide which kernel is used."""


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros whose pages exist only once they are written (`torch.zeros` writes them all).

    They must be zeros and not garbage: a masked position counts with weight 0, and 0 times NaN is NaN.
    """
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


class KVCache:
    """The cache of `rows` requests at most; `tokens` is the most positions that all rows together may reserve.

    `spare_rows` more rows follow those of requests, for the empty rows of a forward pass. `keeps_routes` also keeps the
    experts of tokens, position by position.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dtype: torch.dtype,
        rows: int,
        tokens: int,
        spare_rows: int = 0,
        keeps_routes: bool = False,
    ) -> None:
        self.keeps_routes = keeps_routes
        self._architecture = architecture
        self._dtype = dtype
        self._max_rows = rows
        self._max_tokens = tokens
        self._spare_rows = spare_rows
        self._no_kv, self._no_routes = torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int32)
        self.width, self._kv, self._routes = 0, self._no_kv, self._no_routes

    @staticmethod
    def bytes_per_token(architecture: Architecture, dtype: torch.dtype) -> int:
        a = architecture
        size = torch.empty((), dtype=dtype).element_size()
        return 2 * a.num_layers * a.num_query_groups * a.kv_channels * size

    def clear(self) -> None:
        """Give all memory back; no row may be in use."""
        self.width, self._kv, self._routes = 0, self._no_kv, self._no_routes

    def rows_at(self, width: int) -> int:
        """Return how many rows there can be if each holds `width` positions."""
        return min(self._max_rows, self._max_tokens // _round_up(max(width, self.width)))

    def reserve(self, width: int, *, in_use: int) -> None:
        """Make every row at least `width` positions long, and keep the first `in_use` rows."""
        if width <= self.width:
            return
        a = self._architecture
        old_kv, old_width, self.width = self._kv, self.width, _round_up(width)
        rows = self.rows_at(width) + self._spare_rows
        shape = (2, a.num_layers, rows, a.num_query_groups, self.width, a.kv_channels)
        self._kv = _lazy_zeros(shape, self._dtype)
        if in_use:
            self._kv[:, :, :in_use, :, :old_width] = old_kv[:, :, :in_use]
        if self.keeps_routes:
            old_routes = self._routes
            self._routes = _lazy_zeros((rows, self.width, a.num_moe_layers, a.moe_router_topk), torch.int32)
            if in_use:
                self._routes[:in_use, :old_width] = old_routes[:in_use]

    def write_prompts(self, layer: int, first_row: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [P, K, S, D] into rows [first_row, first_row + P), from position 0 on."""
        rows = slice(first_row, first_row + k.shape[0])
        self._kv[0, layer, rows, :, : k.shape[2]] = k
        self._kv[1, layer, rows, :, : v.shape[2]] = v

    def write_tokens(self, layer: int, rows_B: Tensor, positions_B: Tensor, kv: Tensor) -> None:
        """Write kv [B, 2, K, D], one position in each row."""
        self._kv[:, layer][:, rows_B, :, positions_B] = kv

    def write_prompt_routes(self, moe_layer: int, first_row: int, experts: Tensor) -> None:
        """Write experts [P, S, topk], like `write_prompts`."""
        count, width = experts.shape[:2]
        self._routes[first_row : first_row + count, :width, moe_layer] = experts.to(torch.int32)

    def write_token_routes(self, moe_layer: int, rows_B: Tensor, positions_B: Tensor, experts: Tensor) -> None:
        """Write experts [B, topk], like `write_tokens`."""
        self._routes[rows_B, positions_B, moe_layer] = experts.to(torch.int32)

    def read_routes(self, row: int, length: int) -> Tensor:
        """Return a copy of the experts of the first `length` positions [length, layers with experts, topk]."""
        return self._routes[row, :length].clone()

    def read(self, layer: int, rows: int, span: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, K, span, D] from row `first` on, as views."""
        kv = self._kv[:, layer, first : first + rows, :, :span]
        return kv[0], kv[1]

    def copy(self, source: int, target: int, length: int, *, rows: int = 1) -> None:
        """Copy the first `length` positions of row `source` into `rows` rows from `target` on."""
        self._kv[:, :, target : target + rows, :, :length] = self._kv[:, :, source : source + 1, :, :length]
        if self.keeps_routes:
            self._routes[target : target + rows, :length] = self._routes[source, :length]


def _round_up(width: int) -> int:
    return (width + EMBEDDED_ROW_STEP - 1) // EMBEDDED_ROW_STEP * EMBEDDED_ROW_STEP
