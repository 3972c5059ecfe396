"""The client of the engines: generation goes through the router, everything else to each engine directly.

- Used by: `rollout` generates and aborts with it, and `sync` updates weights with it.
- Invariant: a request that is not a generation goes directly to every engine of the run (or to every engine in the
  router's GET /workers list), because the router would not pass it to all of them. If an engine dies, its generations
  are sent to another engine or wait for one; none is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

from slime.core.awake import LoopClock
from slime.core.pausing import PauseMode
from slime.core.turns import Turns
from slime.engine.connection import Connection, EngineError, encoded
from slime.engine.device_protocol import MemoryOccupation, MemoryTag, UpdateWeightsFromTensor
from slime.engine.engine_info import EngineInfo
from slime.engine.generate_answer import read_answer
from slime.engine.keys import NO_KEYS, Keys
from slime.engine.message import Message
from slime.engine.presence import Presence
from slime.engine.progress import Progress
from slime.engine.protocol import (
    AbortRequest,
    DestroyWeightsUpdateGroup,
    Endpoint,
    GenerateRequest,
    GenerateResponse,
    InitWeightsUpdateGroup,
    PauseGeneration,
    RouterEndpoint,
    SamplingParams,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    WeightsChecker,
)
from slime.engine.refusals import RefusalProbe
from slime.engine.update_sessions import UpdateSessions

__all__ = ["CONTROL_TIMEOUT", "EngineClient", "EngineError"]

CONTROL_TIMEOUT = 600.0
"""Seconds for a request that is not a generation (a weight update may take long)."""


class EngineClient:
    """The client of one event loop, whose requests share connections. Close it, or use `async with`.

    `engines` are the run's own, and only these are controlled; None means all that the router lists.
    """

    def __init__(
        self,
        router_url: str,
        *,
        engines: Sequence[str] | None = None,
        keys: Keys = NO_KEYS,
        request_timeout: float = 1800.0,
        patience: float = 0.0,
    ) -> None:
        """Make a client, which connects with its first request.

        `request_timeout` is how many seconds may pass without progress at any engine before a generation is given up.
        `patience` is how many seconds a request waits for a router or an engine that is being restarted.
        """
        self._router_url = router_url.rstrip("/")
        self._engines = None if engines is None else list(engines)
        self._patience = patience
        self._keys = keys
        self._connection = Connection(self._key_for)
        self.update_sessions = UpdateSessions(self._connection, self.workers)
        self.presence = Presence(self._connection, self.workers)
        self._num_aborts = 0
        self._num_turns = 0
        self._refusals = RefusalProbe(self._connection)
        self.progress = Progress(self._connection, self.workers, request_timeout)
        self._turns = Turns()
        self.num_answered = 0
        """The number of generations answered so far."""

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connection.close()

    @property
    def clock(self) -> LoopClock:
        """A clock that does not advance while this client's event loop is blocked."""
        return self._connection.clock

    def set_engines(self, urls: Sequence[str]) -> None:
        """Control these engines from now on, and give up requests to others."""
        self._engines = list(urls)

    def set_router(self, url: str) -> None:
        self._router_url = url.rstrip("/")

    def _key_for(self, url: str) -> str | None:
        if not self._router_url or not url.startswith(f"{self._router_url}/"):
            return self._keys.engine
        return self._keys.control if url == self._router_url + RouterEndpoint.WORKERS else self._keys.router

    def _is_gone(self, engine: str) -> bool:
        return self._engines is not None and engine not in self._engines

    # ---- through the router

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Generate one response, with the log-prob of each token; an abort also ends a request that no engine has yet.

        Raises:
            EngineError: with the engine's own words; an answer in an unexpected form has status 200.
        """
        num_aborts = self._num_aborts
        # sglang-router drops fields that it does not know, so a request for routed experts goes directly to an engine.
        engines = await self.workers() if request.return_routed_experts else []

        def find_url() -> str | None:
            if num_aborts != self._num_aborts:
                return None
            if not request.return_routed_experts:
                return self._router_url + Endpoint.GENERATE
            return self._next_engine(engines) + Endpoint.GENERATE

        async def probe(waited: float) -> None:
            if self._engines and self._refusals.is_due(waited):
                await self._refusals.raise_refusal(request, self._next_engine(self._engines))

        await self._turns.take()
        try:
            raw = await self._connection.request(
                "POST",
                find_url,
                request,
                timeout=self.progress,
                patience=self._patience,
                before_retry=probe,
                decode=False,
            )
        except EngineError:
            if find_url() is None:
                return GenerateResponse.aborted()
            raise
        self.num_answered += 1
        await self._turns.take()
        try:
            return read_answer(raw, with_log_probs=request.return_logprob)
        except ValueError as error:
            raise EngineError(self._router_url + Endpoint.GENERATE, 200, str(error)) from error

    def _next_engine(self, listed: Sequence[str]) -> str:
        """Return the next engine, round-robin; without any, return the router, whose error then explains it."""
        engines = listed if self._engines is None else self._engines
        self._num_turns += 1
        return engines[self._num_turns % len(engines)] if engines else self._router_url

    async def workers(self) -> list[str]:
        """Return the URLs of all engines in a fixed order, also of those that the router finds unhealthy."""
        return await self._listed() if self._engines is None else list(self._engines)

    async def _listed(self) -> list[str]:
        url = self._router_url + RouterEndpoint.WORKERS
        answer = await self._connection.request("GET", lambda: url, None, timeout=CONTROL_TIMEOUT)
        return sorted(worker["url"] for worker in answer["workers"])

    async def check_router(self, *, joining_or_leaving: Collection[str] = ()) -> None:
        """Check that the router sends requests to the run's engines and to no others, which have other weights.

        `joining_or_leaving`: engines of the run that are being added or removed right now.

        Raises:
            EngineError: naming the engines that are missing or unexpected.
        """
        listed, own = (
            urls.difference(joining_or_leaving) for urls in (set(await self._listed()), set(await self.workers()))
        )
        if listed != own:
            foreign, gone = ", ".join(sorted(listed - own)), ", ".join(sorted(own - listed))
            problem = f"lists engines that are not this run's: {foreign}" if foreign else f"has lost {gone}"
            raise EngineError(self._router_url, 200, f"the router {problem}; one run at a time can use it")

    # ---- at every engine

    async def _everywhere(
        self,
        endpoint: Endpoint,
        bodies: Message | bytes | Sequence[Message] | None,
        *,
        collective: bool = False,
        only: Collection[str] | None = None,
    ) -> list[Any]:
        """POST `bodies` to all engines, or to `only` these, at once (None: GET); return answers in order of `workers`.

        An engine that is removed from the client's list meanwhile is left out, unless the request is `collective`.
        """
        urls = [url for url in await self.workers() if only is None or url in only]
        if not urls:
            raise EngineError(self._router_url, 200, f"the router has no engines for {endpoint}")
        each: list[Message | bytes | None]
        if isinstance(bodies, Sequence) and not isinstance(bodies, bytes):
            each = list(bodies)
        else:  # encoded once for all
            each = [encoded(bodies) if isinstance(bodies, Message) else bodies] * len(urls)
        method = "GET" if bodies is None else "POST"

        def ask(url: str, body: Message | bytes | None) -> asyncio.Task[Any]:
            asking = self._connection.request(
                method,
                lambda: None if self._is_gone(url) else url + endpoint,
                body,
                timeout=CONTROL_TIMEOUT,
                collective=collective,
            )
            return asyncio.ensure_future(asking)

        tasks = [ask(url, body) for url, body in zip(urls, each, strict=True)]
        # Wait for all, and then raise the first failure, so that no request is left running unseen. A collective
        # request cannot end without the engine that failed, so it is not waited for.
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION if collective else asyncio.ALL_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [
            answer
            for url, answer in zip(urls, answers, strict=True)
            if isinstance(answer, BaseException) and (collective or not self._is_gone(url))
        ]
        for failure in failed:
            if not isinstance(failure, asyncio.CancelledError):
                raise failure
        assert not failed, "requests are cancelled only after another one has failed"
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def abort_all(self) -> None:
        """End every request in flight now, with the tokens that it has, and also those that wait for an engine."""
        self._num_aborts += 1
        if self._engines == []:
            return
        await self._everywhere(Endpoint.ABORT_REQUEST, AbortRequest(abort_all=True))

    async def pause(self, mode: PauseMode = "in_place") -> None:
        await self._everywhere(Endpoint.PAUSE_GENERATION, PauseGeneration(mode=mode))

    async def continue_(self) -> None:
        await self._everywhere(Endpoint.CONTINUE_GENERATION, Message())

    async def flush_cache(self) -> None:
        await self._everywhere(Endpoint.FLUSH_CACHE, Message())

    async def health(self) -> dict[str, bool]:
        """Return {engine URL: whether it is healthy}; each engine is asked once, without a retry."""
        urls = await self.workers()
        return dict(zip(urls, await asyncio.gather(*map(self.is_healthy, urls)), strict=True))

    async def is_healthy(self, url: str, *, timeout: float = 10.0) -> bool:
        """Return whether the engine or router at `url` is healthy; it is asked once."""
        return await self._connection.is_healthy(url, timeout)

    async def describe(self) -> list[EngineInfo]:
        """Return every engine's report about itself.

        Raises:
            EngineError: an engine did not answer, or what answers does not use SGLang's protocol.
        """
        servers = await self._everywhere(Endpoint.SERVER_INFO, None)
        models = await self._everywhere(Endpoint.MODEL_INFO, None)
        infos: list[EngineInfo] = []
        for url, server, model in zip(await self.workers(), servers, models, strict=True):
            try:
                infos.append(EngineInfo.from_json(server, model))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise EngineError(url, 200, f"it reports no model, so it is no engine: {error!r}") from error
        return infos

    # ---- memory

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Make every engine give this memory back; it has to be idle, and cannot generate before it has all again."""
        await self._everywhere(Endpoint.RELEASE_MEMORY_OCCUPATION, MemoryOccupation(tags=list(tags)), collective=True)

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Make every engine take this memory again; its weights then have to be sent again."""
        await self._everywhere(Endpoint.RESUME_MEMORY_OCCUPATION, MemoryOccupation(tags=list(tags)), collective=True)

    # ---- weights

    async def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        world_size: int,
        group_name: str,
        backend: str,
        *,
        engine_ranks: Sequence[int] | None = None,
    ) -> None:
        """Make every engine join; this returns when all have, so rank 0 (the trainer) has to join at the same time.

        `engine_ranks` is the number of ranks of each engine, in the order of `workers`; None means one each.
        """
        urls = await self.workers()
        ranks = [1] * len(urls) if engine_ranks is None else list(engine_ranks)
        if len(ranks) != len(urls) or world_size != 1 + sum(ranks):
            raise ValueError(
                f"world_size is {world_size}, but the trainer and {len(urls)} engines of {ranks} ranks "
                f"are {1 + sum(ranks)}"
            )
        bodies = [
            InitWeightsUpdateGroup(
                master_address=master_address,
                master_port=master_port,
                rank_offset=1 + sum(ranks[:i]),
                world_size=world_size,
                group_name=group_name,
                backend=backend,
            )
            for i in range(len(urls))
        ]
        await self._everywhere(Endpoint.INIT_WEIGHTS_UPDATE_GROUP, bodies, collective=True)

    async def update_weights_from_distributed(self, body: UpdateWeightsFromDistributed | bytes) -> None:
        """Make every engine receive one bucket, and return when all have answered; rank 0 broadcasts it meanwhile.

        Buckets are sent one after another. `body` may be the message's JSON, which is the same at each sync.
        """
        await self._everywhere(Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, body, collective=True)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._everywhere(Endpoint.DESTROY_WEIGHTS_UPDATE_GROUP, DestroyWeightsUpdateGroup(group_name=group_name))

    async def forget_weights_update_group(self, group_name: str) -> None:
        """Destroy the group that another run may have left; an engine that knows no such group is not an error."""
        try:
            await self.destroy_weights_update_group(group_name)
        except EngineError as error:
            if error.status != 400:
                raise

    async def update_weights_from_disk(
        self, path: str, weight_version: str | None, only: Collection[str] | None = None
    ) -> None:
        """Make every engine, or `only` these URLs, load an HF directory.

        Caches are kept: flush them first, while nothing is in flight.
        """
        # Inside a session SGLang would load the directory and prepare the weights a second time at the session's end.
        await self.update_sessions.engines()  # ends what was left open
        body = UpdateWeightsFromDisk(model_path=path, weight_version=weight_version, flush_cache=False)
        await self._everywhere(Endpoint.UPDATE_WEIGHTS_FROM_DISK, body, only=only)

    async def update_weights_from_tensor(self, body: UpdateWeightsFromTensor) -> None:
        """Make every engine load a bucket from its own device's memory, which may be overwritten afterwards."""
        await self._everywhere(Endpoint.UPDATE_WEIGHTS_FROM_TENSOR, body, collective=True)

    async def weights_checksum(self) -> list[str]:
        """Return each engine's digest of its weights, comparable between engines of one kind and layout."""
        answers = await self._everywhere(Endpoint.WEIGHTS_CHECKER, WeightsChecker(action="checksum"))
        return [str(answer["per_engine_checksum"]) for answer in answers]

    async def prompt_log_probs(self, tokens: Sequence[int]) -> list[list[float]]:
        """Return each engine's log-probs of the prompt `tokens`, except the first token, which nothing predicts."""
        params = SamplingParams(max_new_tokens=1)
        body = GenerateRequest(input_ids=list(tokens), sampling_params=params, logprob_start_len=0)
        answers = await self._everywhere(Endpoint.GENERATE, body)
        return [[p for p in GenerateResponse.from_json(a).input_log_probs if p is not None] for a in answers]

    async def reset_weights(self, only: Collection[str] | None = None) -> None:
        """Overwrite the weights of every engine, or of `only` these URLs, with garbage, as the start of a check."""
        await self._everywhere(Endpoint.WEIGHTS_CHECKER, WeightsChecker(action="reset_tensors"), only=only)

    async def weight_versions(self) -> list[str]:
        return [str(answer["weight_version"]) for answer in await self._everywhere(Endpoint.MODEL_INFO, None)]
