"""Let actors raise only errors that the driver can read: any other arrives there as a RunError with the same text.

- Used by: the actors' classes, which `portable_errors` decorates.
- Invariant: an error of user code, whatever its class needs, never looks like the death of the process that raised it.

Ray sends an error as a pickle. A class of a user or of a library may not be unpickled (openai's errors require keyword
arguments), or not be importable in the driver. Ray then reports the actor as lost, and a lost actor is a Fault, for
which a run starts again.
"""

from __future__ import annotations

import functools
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from slime.core.errors import RunError
from slime.core.user_code import described, place_of

Actor = TypeVar("Actor")

logger = logging.getLogger(__name__)
_KNOWN = ("builtins", "slime", "torch", "ray")
"""The packages whose errors every process can import."""


def portable_errors(actor: type[Actor]) -> type[Actor]:
    """Return the class with public methods that raise portable errors, and log their whole tracebacks first."""
    for name, method in list(vars(actor).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(actor, name, _guarded(name, method))
    return actor


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            try:
                return await method(*args, **kwargs)
            except (Exception, SystemExit) as error:
                logger.error("%s failed", name, exc_info=error)
                raise portable(error) from error

        return call_async

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (Exception, SystemExit) as error:
            logger.error("%s failed", name, exc_info=error)
            raise portable(error) from error

    return call


def portable(error: BaseException) -> Exception:
    """Return the error itself if the driver can read it; otherwise a RunError with its type, text and place."""
    if isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _KNOWN and _survives(error):
        return error
    place = place_of(error)
    return RunError(described(error) + ("" if place is None else f" ({place})"))


def _survives(error: Exception) -> bool:
    """Return whether a pickle of the error gives an error of the same class."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception as broken:  # noqa: BLE001 (pickling calls code of the error's class)
        logger.info("an error that cannot be sent: %s", described(broken))
        return False
