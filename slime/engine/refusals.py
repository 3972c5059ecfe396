"""Finds out whether an engine refuses a request for good, where a router only says that it has no engine.

Path: the client asks here between two attempts of a generation. Invariant: at most one engine is asked within
PROBE_EVERY seconds, whatever the number of requests that wait.
"""

from __future__ import annotations

import time
from dataclasses import replace

from slime.engine.connection import Connection, EngineError
from slime.engine.protocol import Endpoint, GenerateRequest

PROBE_EVERY = 10.0
"""Seconds without an engine behind the router, after which, and after each further such time, one is asked directly."""


class RefusalProbe:
    """Asks engines themselves, not the router."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._probed = 0.0

    def is_due(self, waited: float) -> bool:
        """Whether a request that has waited so many seconds should be asked about now."""
        return waited >= PROBE_EVERY and time.monotonic() - self._probed >= PROBE_EVERY

    async def raise_refusal(self, request: GenerateRequest, engine: str) -> None:
        """Ask `engine` for one token of `request`.

        The router answers 503 also where its circuit breaker has taken out engines that work and refuse every request.
        Waiting does not help then, and the engine's own answer says why.

        Raises:
            EngineError: the engine refuses the request for good.
        """
        self._probed = time.monotonic()
        one = replace(request, sampling_params=replace(request.sampling_params, max_new_tokens=1))
        url = engine + Endpoint.GENERATE
        try:
            await self._connection.request("POST", lambda: url, one, timeout=PROBE_EVERY, collective=True)
        except EngineError as error:
            if error.status != 200 and not error.may_pass:
                raise
