r"""`--rm-type remote_rm`: a judge that is called over HTTP.

- Called by: `pool`, in the event loop, where many requests wait at the same time; no part of it runs in a worker.
- Invariant: a judge that is down, slow or wrong gives a typed failure, and never a reward of 0.

    POST --rm-url  {"prompt": text or messages, "response": text, "label": text or null, "metadata": {...},
                    "row": the data line's columns, or null if they have more than MAX_ROW bytes or no JSON}
    answer         0.5, or {"reward": 0.5}, or {"score": 0.5}, or with --reward-key KEY {KEY: 0.5, ...}

With --reward-key the answer's other entries are kept in the sample's reward; the dict may also be under "reward".

With `boxed_remote_rm`, "response" is the content of the last \boxed{...} ("" if there is none). A judge that cannot be
reached, or answers 429, 500, 502, 503 or 504, is asked again, up to RETRIES times and for --rm-timeout seconds in all.
Every other status, and an answer in no form above, is a failure at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
import orjson

from slime.config.args import Args
from slime.core.boxes import last_boxed
from slime.core.masking import Masker
from slime.core.sample import Sample
from slime.rollout.reward_pool.verdict import ERROR, TIMEOUT, Verdict, error_verdict, verdict_of

MAX_ROW = 64 * 1024
RETRIES = 5
BACKOFF = 0.1
"""Seconds before the first retry; each further retry waits twice as long."""
RETRY_STATUS = (429, 500, 502, 503, 504)
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class RemoteReward:
    """Sends samples to the judge, with at most --rm-concurrency requests at once."""

    def __init__(self, args: Args) -> None:
        self._url = args.resolved.rm_url
        self._mask = Masker([self._url])  # failures go into logs and dumps
        self._timeout = args.rm_timeout
        self._key = args.reward_key
        self._slots = asyncio.Semaphore(args.rm_concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = 0

    async def judge(self, sample: Sample, *, boxed: bool) -> Verdict:
        """Judge one sample; the time limit begins with the first request, not while the sample waits for its turn."""
        response = (last_boxed(sample.response) or "") if boxed else sample.response
        body = {"prompt": sample.prompt, "response": response, "label": sample.label, "metadata": sample.metadata}
        body["row"] = _small_row(sample)
        try:
            data = orjson.dumps(body, option=_JSON)
        except TypeError as error:  # something in metadata that JSON cannot represent
            return error_verdict(error)
        failure = TIMEOUT
        async with self._slots, self._shared_session() as session:
            try:
                async with asyncio.timeout(self._timeout):
                    for attempt in range(RETRIES + 1):
                        if attempt:
                            await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
                        verdict, again = await self._ask(session, data)
                        if not again:
                            return verdict
                        failure = verdict.failure
            except TimeoutError:
                return Verdict(None, failure)
        return Verdict(None, failure)

    async def _ask(self, session: aiohttp.ClientSession, data: bytes) -> tuple[Verdict, bool]:
        """Send one request; return its verdict, and whether to try again."""
        try:
            async with session.post(self._url, data=data, allow_redirects=False) as answer:
                raw = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            lost = isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError)
            why = self._mask(f"{type(error).__name__}: {error}")
            return Verdict(None, f"{ERROR}: --rm-url did not answer: {why}"), lost
        if answer.status != 200:
            text = self._mask(raw.decode(errors="replace"))[:200]
            failed = Verdict(None, f"{ERROR}: --rm-url answered {answer.status}: {text}")
            return failed, answer.status in RETRY_STATUS
        return answer_verdict(raw, self._mask, self._key).masked(self._mask), False

    @asynccontextmanager
    async def _shared_session(self) -> AsyncGenerator[aiohttp.ClientSession]:
        """Yield the session that all requests in flight share; it is closed when none is in flight."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            limits = aiohttp.ClientTimeout(total=None)  # --rm-timeout limits all attempts together
            headers = {"Content-Type": "application/json"}
            self._session = aiohttp.ClientSession(connector=connector, timeout=limits, headers=headers)
        self._in_flight += 1
        try:
            yield self._session
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                session, self._session = self._session, None
                await session.close()


def _small_row(sample: Sample) -> orjson.Fragment | None:
    """Return the sample's data line as JSON, or None if it is large or has something that JSON cannot represent."""
    try:
        row = orjson.dumps(sample.row, option=_JSON)
    except TypeError:
        return None
    return orjson.Fragment(row) if len(row) <= MAX_ROW else None


def answer_verdict(raw: bytes, mask: Masker, key: str | None = None) -> Verdict:
    """Return the verdict in the judge's answer; `mask` hides secrets that it repeats. `key` is --reward-key."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        text = mask(raw.decode(errors="replace"))[:200]
        return Verdict(None, f"{ERROR}: --rm-url answered what is not JSON ({error}): {text}")
    if isinstance(value, dict):
        reward = value.get("reward", value.get("score"))
        is_whole = key is not None and not isinstance(reward, dict) and (key in value or reward is None)
        value = value if is_whole else reward
    return verdict_of(value, key)
