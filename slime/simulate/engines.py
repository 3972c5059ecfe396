"""Timed engines: requests that share an engine's time, with its limit of running requests, on the virtual clock.

- Used by: `rollouts` gives them to the real collector in the place of a client of real engines.
- Invariant: every second of an engine is busy (at least one request runs) or idle, and the two sum to the wall time. A
  request that is aborted has the tokens that it would have had at that moment.

A decode step of B requests takes a + b x B seconds, so each request gets 1 / (a + b x B) tokens a second. Prefill goes
first, as in SGLang: while it runs, no request decodes.

All running requests get tokens at one rate. So an engine counts the tokens that each of them has got since it started
(`_served`); a request that begins at 40 and needs 10 tokens ends when the count reaches 50, whoever comes and goes.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from slime.engine.client import EngineClient
from slime.engine.protocol import FinishReason, GenerateRequest, GenerateResponse
from slime.simulate.lengths import Lengths
from slime.simulate.speeds import EngineSpeed

FIRST_PROMPT = 2
"""The token of prompt number 0; every prompt is a single token that names it."""
TOKEN, END = 0, 1
"""The tokens of a response: END is its last one."""
_SLACK = 1e-6
"""The part of a token that may be missing through rounding when a request ends."""


@dataclass(eq=False)
class _Request:
    """A request on its way through an engine; lengths in tokens, except `units`."""

    prefill: int
    need: float
    """The number of tokens until it ends."""
    units: int
    finish: FinishReason
    answer: asyncio.Future[GenerateResponse]
    begin: float = 0.0
    """The engine's count when it started; it ends at `begin + need`."""


@dataclass
class EngineTimes:
    """The seconds of one engine so far, and the integral of its running requests over time."""

    busy: float = 0.0
    idle: float = 0.0
    request_seconds: float = 0.0


class TimedEngine:
    """One engine, which runs at most `limit` requests at a time; the others wait in the order of their arrival."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, speed: EngineSpeed, limit: int, *, freed: Callable[[], None]
    ) -> None:
        """`freed` is called when requests have ended."""
        self._loop = loop
        self._freed = freed
        self._speed = speed
        self._limit = limit
        self._running: list[tuple[float, int, _Request]] = []
        self._waiting: deque[_Request] = deque()
        self._count = 0
        self._served = 0.0
        self._stall = 0.0
        """Seconds of prefill that are left."""
        self._at = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self.version = 0
        self.times = EngineTimes()

    @property
    def load(self) -> int:
        """The number of requests that run or wait."""
        return len(self._running) + len(self._waiting)

    def settle(self) -> EngineTimes:
        """Return the engine's times until now."""
        self._advance()
        return self.times

    def submit(self, request: _Request) -> None:
        self._advance()
        self._waiting.append(request)
        self._go_on()

    def pause(self) -> None:
        """Let new requests wait until `resume`; nothing may be running."""
        self._paused = True

    def resume(self, version: int) -> None:
        """Go on with new weights."""
        self._advance()
        self._paused, self.version = False, version
        self._go_on()

    def abort(self) -> list[tuple[_Request, int]]:
        """End all requests, and return each with the number of whole tokens that it has got."""
        self._advance()
        ended = [(request, int(self._served - request.begin + _SLACK)) for _, _, request in sorted(self._running)]
        ended += [(request, 0) for request in self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._stall = 0.0
        self._go_on()
        self._freed()
        return ended

    def _advance(self) -> None:
        """Account for the time since the last event, in which the same requests were running."""
        now = self._loop.time()
        passed, self._at = now - self._at, now
        count = len(self._running)
        if not count:
            self.times.idle += passed
            return
        self.times.busy += passed
        self.times.request_seconds += passed * count
        stalled = min(self._stall, passed)
        self._stall -= stalled
        self._served += (passed - stalled) * self._speed.rate(count)

    def _go_on(self) -> None:
        """Start waiting requests where there is room, and set the timer of the next one that ends."""
        while self._waiting and len(self._running) < self._limit and not self._paused:
            request = self._waiting.popleft()
            self._stall += self._speed.prefill_seconds(request.prefill)
            request.begin = self._served
            self._count += 1
            heapq.heappush(self._running, (request.begin + request.need, self._count, request))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            left = max(self._running[0][0] - self._served, 0.0)
            seconds = self._stall + left / self._speed.rate(len(self._running))
            self._timer = self._loop.call_later(seconds, self._end_due)

    def _end_due(self) -> None:
        """End the requests that have all their tokens."""
        self._timer = None
        self._advance()
        while self._running and self._running[0][0] <= self._served + _SLACK:
            _, _, request = heapq.heappop(self._running)
            _answer(request, request.units, request.finish, self.version)
        self._go_on()
        self._freed()


def _answer(request: _Request, units: int, finish: FinishReason, version: int) -> None:
    if request.answer.done():
        return  # whoever asked was cancelled
    ids = [TOKEN] * units
    if finish == "stop":
        ids[-1] = END
    request.answer.set_result(
        GenerateResponse(
            output_ids=ids,
            log_probs=[0.0] * units,
            finish_reason=finish,
            weight_version=str(version),
            text="",
            prompt_tokens=0,
            completion_tokens=units,
            input_log_probs=[],
        )
    )


class TimedEngines(EngineClient):
    """A client of timed engines, which the collector uses like one of real engines.

    A new request goes to the engine with the fewest requests. Lengths inside requests and samples are counted in units
    of `grain` tokens, which keeps long rollouts small in memory: a length is rounded to the nearest unit, at least one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engines: int,
        speed: EngineSpeed,
        limit: int,
        lengths: Lengths,
        grain: int,
    ) -> None:
        """Make `engines` engines that run at most `limit` requests each."""
        super().__init__("http://simulated", engines=[f"http://engine-{index}" for index in range(engines)])
        self._loop = loop
        self._lengths = lengths
        self._grain = grain
        self._most = max(1, lengths.longest // grain)
        """The units at which a response is cut."""
        self.engines = [
            TimedEngine(loop, speed, limit, freed=partial(self._note_load, index)) for index in range(engines)
        ]
        self._order = [(0, index) for index in range(engines)]
        """A heap of (load, engine) with an entry for each change of a load; entries of an earlier load are skipped."""
        self.tokens = 0
        """The response tokens generated so far, also those that nobody trains on."""

    def units(self, prompt: int, seed: int) -> int:
        """Return the length of a response in units."""
        rounded = (self._lengths.response(prompt, seed) + self._grain // 2) // self._grain
        return max(1, min(rounded, self._most))

    def sequence_tokens(self, prompt: int, units: int) -> int:
        """Return the tokens of a prompt with `units` units of response."""
        return self._lengths.prompt(prompt) + units * self._grain

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Generate what is left of a response, up to the request's limit; both are in units."""
        ids, params = request.input_ids, request.sampling_params
        assert ids is not None and params.sampling_seed is not None, "the collector sends token ids and seeds"
        prompt, done = ids[0] - FIRST_PROMPT, len(ids) - 1
        left = max(1, self.units(prompt, params.sampling_seed) - done)
        allowed = params.max_new_tokens
        units = min(left, allowed)
        timed = _Request(
            prefill=self.sequence_tokens(prompt, done),
            need=float(units * self._grain),
            units=units,
            finish="stop" if left <= allowed and done + left < self._most else "length",
            answer=self._loop.create_future(),
        )
        self._submit(timed)
        response = await timed.answer
        self.tokens += len(response.output_ids) * self._grain
        return response

    def _note_load(self, index: int) -> None:
        heapq.heappush(self._order, (self.engines[index].load, index))

    def _submit(self, request: _Request) -> None:
        """Give the request to an engine with the fewest requests, the first of several."""
        while True:
            load, index = heapq.heappop(self._order)
            if load == self.engines[index].load:
                break
        self.engines[index].submit(request)
        self._note_load(index)

    async def abort_all(self) -> None:
        """End all requests with the whole units that they have."""
        for engine in self.engines:
            for request, tokens in engine.abort():
                units = min(tokens // self._grain, request.units - 1)
                _answer(request, units, "abort", engine.version)

    def pause_all(self) -> None:
        for engine in self.engines:
            engine.pause()

    def resume_all(self, version: int) -> None:
        for engine in self.engines:
            engine.resume(version)
