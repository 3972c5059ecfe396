"""Find out whether engines refuse a request for good, when the router reports only that it has no engine.

- Called by: the client, between two attempts of a generation.
- Invariant: at most one engine is asked within PROBE_EVERY seconds, however many requests wait.
"""

from __future__ import annotations

import time
from dataclasses import replace

from slime.engine.connection import Connection, EngineError
from slime.engine.protocol import Endpoint, GenerateRequest

PROBE_EVERY = 10.0
"""Seconds without an engine at the router before one is asked directly, and between two such probes."""


class RefusalProbe:
    """Asks engines directly, not through the router."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._probed = 0.0

    def is_due(self, waited: float) -> bool:
        """Return whether to ask an engine now about a request that has waited `waited` seconds."""
        return waited >= PROBE_EVERY and time.monotonic() - self._probed >= PROBE_EVERY

    async def raise_refusal(self, request: GenerateRequest, engine: str) -> None:
        """Ask `engine` for one token of `request`.

        The router also answers 503 if its circuit breaker has taken out engines that work but refuse every request.
        Waiting does not help then, and the engine's own answer gives the reason.

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
