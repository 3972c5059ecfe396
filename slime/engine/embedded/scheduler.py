"""Continuous batching: choose the running requests and decode one step at a time, in a thread of its own.

- Called by: `server` puts requests and commands into one inbox. Each step admits waiting requests (prefill), then
  decodes one token for every running one. Finished requests go back through `on_finished`.
- Invariant: commands run only between steps, so weights never change during a forward pass. An error in the loop ends
  the loop and is reported through `on_failure`; it is never swallowed.

A request's life: waiting -> (prefill) running in a cache row -> finished with stop, length, abort or an error.
`retract` moves running requests back to waiting with the tokens that they have; then prompt and response are prefilled
again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from slime.core.pausing import PauseMode
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.fixed_shapes import FixedShapes
from slime.engine.embedded.model import Model
from slime.engine.embedded.request import ABORTED_WAITING, Request, aborted, reason_to_finish
from slime.engine.embedded.sampler import SamplingBatch, sample

logger = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT = 1.0
PREFILL_TOKENS = 8192
"""The most padded prompt tokens in one forward pass, which limits its activations (a longer prompt goes alone)."""
PADDING = 1.5
"""The largest ratio between the lengths of prompts in one prefill forward."""

ROW = np.dtype(
    [(name, np.int64) for name in ("position", "token", "top_k", "limit", "may_stop")]
    + [(name, np.float64) for name in ("temperature", "top_p", "min_p")]
    + [("seed", np.uint64)]
)


class Scheduler:
    """Runs `model` for requests. Every method except `submit`, `call`, `start` and `stop` belongs to its thread."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        on_finished: Callable[[list[Request]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.model = model
        self.cache = cache
        self.fixed_shapes: FixedShapes | None = None
        """If set, a request's result does not depend on the other requests."""
        self.weight_version = "0"
        self.pause_mode: PauseMode | None = None
        self.holds: set[str] = set()
        """Reasons not to step although no client has paused the engine."""
        self.beat = time.monotonic()
        self._on_finished = on_finished
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._rows = np.zeros(0, dtype=ROW)
        self._finished: list[Request] = []
        self._prompts: dict[tuple[int, ...], tuple[Request, Tensor]] = {}
        """Running requests by prompt, with the last hidden state: an equal prompt copies their cache row."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # ---- from other threads

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the loop; a step that takes longer than this method waits ends with the process."""
        self._inbox.put(self._stop)
        self._thread.join(timeout=2.0)

    def submit(self, request: Request) -> None:
        self._inbox.put(lambda: self._waiting.append(request))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` between two steps; the future gets its result or its error."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the caller has gone
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)

        self._inbox.put(command)
        return future

    # ---- commands, run through `call`

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_tokens(self) -> int:
        """The tokens of the running requests, prompts and responses; the number grows with every step."""
        return int(self._rows["position"][: len(self._running)].sum())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def abort(self, chosen: Callable[[Request], bool]) -> int:
        """Abort the chosen requests, and return their number.

        A waiting request ends now. A running request ends with the token of the next step, as in SGLang. While the
        weights are incomplete there is no next step, and it ends now as well.
        """
        running = [r for r in self._running if chosen(r) and not r.is_aborting]
        waiting = [r for r in self._waiting if chosen(r)]
        for request in waiting:
            self._finish(request, ABORTED_WAITING)
        gone = set(map(id, waiting))
        self._waiting = deque(r for r in self._waiting if id(r) not in gone)
        for request in running:
            if self.holds:
                self._finish(request, aborted("Aborted"))
            else:
                request.is_aborting = True
                self._rows[request.row]["may_stop"] = True
        self._compact()
        return len(running) + len(waiting)

    def pause(self, mode: PauseMode) -> None:
        """Sample no token until `resume`. With "abort" all requests have ended when this returns."""
        self.pause_mode = mode
        if mode == "abort":
            self.abort(lambda _: True)
            if self._running:
                self._decode()
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        self.pause_mode = None

    def retract(self) -> None:
        """Move running requests back to the front of the waiting ones; their cache rows become free."""
        for request in reversed(self._running):
            self._read_routes(request)
            request.row = -1
            self._waiting.appendleft(request)
        self._running = []
        self._prompts.clear()

    def forget_prompts(self) -> None:
        """Stop sharing cache rows between equal prompts, because older weights made them."""
        self._prompts.clear()

    # ---- the loop

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._take_commands()
                    if self._may_step():
                        self.step()
                    self._deliver()
        except BaseException as error:  # the server then ends the process
            logger.exception("the scheduler failed")
            self._on_failure(error)

    def _may_step(self) -> bool:
        return self.pause_mode is None and not self.holds and bool(self._running or self._waiting)

    def _take_commands(self) -> None:
        self.beat = time.monotonic()
        block = not self._may_step()
        try:
            while True:
                self._inbox.get(block=block, timeout=HEARTBEAT)()
                block = False
        except queue.Empty:
            return

    def _deliver(self) -> None:
        if self._finished:
            finished, self._finished = self._finished, []
            self._on_finished(finished)

    def step(self) -> None:
        """Admit the requests that fit, then decode one token for all running ones."""
        if self._waiting:
            self._admit()
        if self._running:
            self._decode()

    def _decode(self) -> None:
        rows = self._rows[: len(self._running)]
        tokens, positions = torch.from_numpy(rows["token"].copy()), torch.from_numpy(rows["position"].copy())
        if self.fixed_shapes is None:
            hidden = self.model.decode(tokens, positions, self.cache)
        else:
            hidden = self.fixed_shapes.decode(tokens, positions)
        rows["position"] += 1
        self._sample(hidden, 0)

    # ---- admission

    def _admit(self) -> None:
        """Move waiting requests, in order, into cache rows while there is room, and sample the next token of each."""
        first = len(self._running)
        chosen: list[Request] = []
        width = self.cache.width
        while self._waiting:
            request = self._waiting[0]
            needed = max(width, request.room)
            if first + len(chosen) + 1 > self.cache.rows_at(needed):
                break
            width = needed
            chosen.append(self._waiting.popleft())
        if not chosen:
            return
        self.cache.reserve(width, in_use=first)
        self._grow_rows(first + len(chosen))
        hidden = self._prefill(chosen)
        for request in chosen:
            self._fill_row(request)
        # Requests may be placed in another order than they came in, because unique prompts are placed first.
        self._running.extend(sorted(chosen, key=lambda r: r.row))
        self._sample(hidden, first)

    def _grow_rows(self, count: int) -> None:
        if count > len(self._rows):
            rows = np.zeros(max(count, 2 * len(self._rows)), dtype=ROW)
            rows[: len(self._rows)] = self._rows
            self._rows = rows

    def _fill_row(self, request: Request) -> None:
        p, row = request.params, self._rows[request.row]
        row["position"] = len(request.input_ids) + len(request.output_ids)
        row["limit"] = len(request.input_ids) + p.max_new_tokens
        row["may_stop"] = bool(request.stop_token_ids or request.stop_check or request.is_aborting)
        row["temperature"], row["top_p"], row["top_k"], row["min_p"] = p.temperature, p.top_p, p.top_k, p.min_p
        row["seed"] = request.seed

    def _prefill(self, chosen: list[Request]) -> Tensor:
        """Fill a cache row for each request; return their last hidden states [len(chosen), hidden], by row.

        Equal prompts are prefilled once: the other requests copy the row. For example, with 5 running requests and new
        prompts A, A, B, the prompts A and B are prefilled into rows 5 and 6, and row 5 is copied to row 7.
        """
        first = row = len(self._running)
        groups: dict[tuple[int, ...], list[Request]] = {}
        for request in chosen:
            request.key = tuple(request.ids)
            groups.setdefault(request.key, []).append(request)
        last: dict[tuple[int, ...], tuple[int, Tensor]] = {
            key: (self._prompts[key][0].row, self._prompts[key][1])
            for key, members in groups.items()
            if key in self._prompts and not any(r.logprob_start_len >= 0 for r in members)
        }
        fresh = sorted((key for key in groups if key not in last), key=len)
        for part in _parts(fresh) if self.fixed_shapes is None else ([prompt] for prompt in fresh):
            hidden = self.model.prefill([list(key) for key in part], self.cache, row)
            for i, key in enumerate(part):
                last[key] = (row + i, hidden[i, len(key) - 1].clone())
                groups[key][0].row = row + i
                self._score_prompt(groups[key], hidden[i])
            row += len(part)
        for key, members in groups.items():
            source, state = last[key]
            copies = [r for r in members if r.row < 0]
            if copies:
                self.cache.copy(source, row, len(key), rows=len(copies))
            for request in copies:
                request.row, request.cached_tokens = row, len(key)
                row += 1
            self._prompts.setdefault(key, (members[0], state))
        states = {r.row: last[key][1] for key, members in groups.items() for r in members}
        return torch.stack([states[i] for i in range(first, row)])

    def _score_prompt(self, requests: list[Request], hidden_S: Tensor) -> None:
        """Add log-probs of prompt tokens after `logprob_start_len`, from the raw logits (SGLang's rule)."""
        for request in requests:
            if request.logprob_start_len < 0 or request.input_log_probs:
                continue
            start, targets = request.logprob_start_len + 1, request.input_ids
            for begin in range(start, len(targets), 512):
                end = min(begin + 512, len(targets))
                logits = self.model.logits(hidden_S[begin - 1 : end - 1])
                wanted = torch.tensor(targets[begin:end])[:, None]
                log_probs = logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True)
                request.input_log_probs += log_probs[:, 0].tolist()

    # ---- after a forward

    def _sample(self, hidden: Tensor, first: int) -> None:
        """Sample a token for rows [first, running), and finish the requests that it ends."""
        rows = self._rows[first : len(self._running)]
        batch = SamplingBatch(**{f.name: rows[f.name] for f in fields(SamplingBatch)})
        fixed = self.fixed_shapes
        draw = sample(self.model.logits(hidden), batch) if fixed is None else fixed.sample(hidden, batch)
        rows["token"] = draw.tokens
        requests = self._running[first:]
        for request, token, log_prob in zip(requests, draw.tokens.tolist(), draw.log_probs.tolist(), strict=True):
            request.output_ids.append(token)
            request.log_probs.append(log_prob)
        full = rows["position"] + 1 >= rows["limit"]
        for i in np.flatnonzero(full | (rows["may_stop"] != 0) | ~draw.finite).tolist():
            self._judge(requests[i], full=bool(full[i]), finite=bool(draw.finite[i]))
        self._compact()

    def _judge(self, request: Request, *, full: bool, finite: bool) -> None:
        """Finish the request if its newest token ends it."""
        if not finite:
            request.error = f"the model's logits are not finite (weight version {self.weight_version})"
            self._finish(request, aborted(request.error))
            return
        reason = reason_to_finish(request, full=full)
        if reason is not None:
            if request.params.max_new_tokens == 0:  # the client wants only the prompt's log-probs
                request.output_ids.clear()
                request.log_probs.clear()
            self._finish(request, reason)

    def _finish(self, request: Request, reason: dict[str, Any]) -> None:
        request.finish_reason = reason
        request.weight_version = self.weight_version
        self._read_routes(request)
        self._finished.append(request)

    def _read_routes(self, request: Request) -> None:
        """Copy the routes while the request has its row; after a retraction it keeps the ones that it had."""
        if request.return_routes and request.row >= 0:
            request.routes = self.cache.read_routes(request.row, len(request.input_ids) + len(request.output_ids) - 1)

    def _compact(self) -> None:
        """Move the last running requests into the rows of finished ones."""
        for i in [r.row for r in self._running if r.finish_reason is not None]:
            while self._running and self._running[-1].finish_reason is not None:
                self._forget(self._running.pop())
            last = len(self._running) - 1
            if i > last:
                continue
            gone, moved = self._running[i], self._running.pop()
            self._forget(gone)
            self.cache.copy(moved.row, i, int(self._rows["position"][last]))
            self._rows[i] = self._rows[last]
            self._running[i], moved.row = moved, i

    def _forget(self, request: Request) -> None:
        entry = self._prompts.get(request.key)
        if entry is not None and entry[0] is request:
            del self._prompts[request.key]


def _parts(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Split prompts, sorted by length, into forward passes of similar lengths and at most PREFILL_TOKENS."""
    parts: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        part = parts[-1] if parts else None
        if part is None or len(prompt) > PADDING * len(part[0]) or len(prompt) * (len(part) + 1) > PREFILL_TOKENS:
            parts.append([prompt])
        else:
            part.append(prompt)
    return parts
