"""A generation request, and the reasons that end it.

- Used by: `server` makes one for each /generate. `scheduler` adds tokens to it and checks here after each one.
- Invariant: the reasons to finish are checked in the order of SGLang 0.5.16.

Later versions look for stops before they look at the length. A client has to work with both orders: one that reads
"length" as "more would have come" fails with this order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slime.engine.protocol import SamplingParams


@dataclass(eq=False)
class Request:
    """One generation. `seed` is always set: the server draws one if the client gave none."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    """All tokens that end it, including the model's own."""
    logprob_start_len: int = -1
    return_routes: bool = False
    stop_check: Callable[[Sequence[int]], str | None] | None = None
    """Returns the stop text that the output so far contains, or None."""
    output_ids: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    input_log_probs: list[float] = field(default_factory=list[float])
    """The log-probs of the prompt tokens after `logprob_start_len`."""
    routes: Tensor | None = None
    """Experts of all tokens but the last, which has not been run: [tokens - 1, layers with experts, topk]."""
    finish_reason: dict[str, Any] | None = None
    is_aborting: bool = False
    """Whether it was aborted while it ran; it then ends with its next token."""
    error: str | None = None
    weight_version: str = ""
    cached_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    row: int = -1
    key: tuple[int, ...] = ()
    """The tokens that were prefilled for it."""

    @property
    def ids(self) -> list[int]:
        return self.input_ids + self.output_ids

    @property
    def room(self) -> int:
        """The most cache positions that it needs (the last token is never written)."""
        return len(self.input_ids) + max(self.params.max_new_tokens, 1)


def reason_to_finish(request: Request, *, full: bool) -> dict[str, Any] | None:
    """Return SGLang's `finish_reason` if the newest token ends the request; `full`: there is room for no other."""
    newest = request.output_ids[-1]
    if request.is_aborting:
        return aborted("Aborted")
    if full:
        return {"type": "length", "length": request.params.max_new_tokens}
    if request.stop_check is not None and (matched := request.stop_check(request.output_ids)) is not None:
        return {"type": "stop", "matched": matched}
    if newest in request.stop_token_ids:
        return {"type": "stop", "matched": newest}
    return None


def aborted(message: str) -> dict[str, Any]:
    """Return SGLang's finish reason for a request that was aborted while it ran."""
    return {"type": "abort", "message": message, "status_code": None, "err_type": None}


ABORTED_WAITING: dict[str, Any] = {"type": "abort", "message": "Abort in waiting queue"}
"""SGLang's finish reason for a request that was aborted before it ran."""
