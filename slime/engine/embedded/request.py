"""A generation request, and what ends it.

Path: `server` makes one for each /generate; `scheduler` gives it tokens and asks here after each one.
Invariant: reasons to finish are looked for in the order of SGLang 0.5.16. Later versions look for stops before they
look at the length, and both orders are right for a client: one that takes "length" for "there is more to come" fails
under this one.
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
    """One generation. `seed` is always set: the server draws one where the client gave none."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    """All that end it, the model's own included."""
    logprob_start_len: int = -1
    return_routes: bool = False
    stop_check: Callable[[Sequence[int]], str | None] | None = None
    """Given the output so far, the stop string that it now contains."""
    output_ids: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    input_log_probs: list[float] = field(default_factory=list[float])
    """Of the prompt tokens after `logprob_start_len`."""
    routes: Tensor | None = None
    """Experts of all tokens but the last, which has not been run [tokens - 1, layers with experts, topk]."""
    finish_reason: dict[str, Any] | None = None
    is_aborting: bool = False
    """It was aborted while it ran, and ends with its next token."""
    error: str | None = None
    weight_version: str = ""
    cached_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    row: int = -1
    key: tuple[int, ...] = ()
    """What was prefilled for it."""

    @property
    def ids(self) -> list[int]:
        return self.input_ids + self.output_ids

    @property
    def room(self) -> int:
        """Cache positions it needs at most (the last token is never written)."""
        return len(self.input_ids) + max(self.params.max_new_tokens, 1)


def reason_to_finish(request: Request, *, full: bool) -> dict[str, Any] | None:
    """SGLang's `finish_reason` if the newest token ends the request; `full`: it is the last one there is room for."""
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
    """SGLang's reason of a request that was aborted while it ran."""
    return {"type": "abort", "message": message, "status_code": None, "err_type": None}


ABORTED_WAITING: dict[str, Any] = {"type": "abort", "message": "Abort in waiting queue"}
"""SGLang's reason of a request that was aborted before it ran."""
