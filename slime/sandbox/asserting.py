"""The program that runs a row's asserts, in a sandbox in which no code of the response runs.

- Run by: `judging`. `serving`, in another sandbox, is at the other end of the channel.
- Invariant: the response's code never sees an expected value, and has no way to write the result. What it returns
  arrives as plain data, or as a `Remote`, which can be called and read, but never compared and never true or false.

A test such as `assert add(2, 2) == 4` finds a Remote under the name `add`. Calling it sends the arguments and returns
the int that comes back, and this process compares it with 4.
"""

from __future__ import annotations

import builtins
import json
import os
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

from slime.sandbox.wire import Gone, decode, encode, receive, send

_CHANNEL = 3
TESTS = "tests.json"


class Unsupported(BaseException):
    """The test needs something that cannot be sent to the response's process, so there is no verdict."""


class Opaque(AssertionError):
    """The test compares an object of the response's own, whose comparison would be the response's word."""


class _Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.gone: Gone | None = None

    def name(self, name: str) -> Any:
        """Return the response's global of this name, or raise a NameError."""
        answer = self._ask({"do": "name", "name": name})
        if "missing" in answer:
            raise NameError(f"the response does not define {name}")
        return self._value(answer)

    def do(self, what: str, ref: int, *arguments: Any, **named: Any) -> Any:
        """Have something done with an object of the response's, and return the result."""
        sent = [encode(each, _refer) for each in arguments]
        named = {name: encode(each, _refer) for name, each in named.items()}
        answer = self._ask({"do": what, "ref": ref, "arguments": sent, "named": named})
        if "raised" in answer:
            _raise(answer)
        for place, after in answer.get("changed", {}).items():
            _change(arguments[int(place)], self._decoded(after))
        return self._value(answer)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.gone is not None:
            raise self.gone
        try:
            send(self._connection, request)
            answer = receive(self._connection)
            if not isinstance(answer, dict):
                raise Gone("no answer")
            return answer
        except (Gone, OSError) as error:
            self.gone = error if isinstance(error, Gone) else Gone(str(error))
            raise self.gone from None

    def _value(self, answer: dict[str, Any]) -> Any:
        return self._decoded(answer.get("value"))

    def _decoded(self, data: Any) -> Any:
        try:
            return decode(data, lambda number: Remote(self, number))
        except Exception as error:  # noqa: BLE001 (the other process may send anything)
            self.gone = Gone(f"no value: {type(error).__name__}: {error}")
            raise self.gone from None


def _refer(value: Any) -> int:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_ref")
    raise Unsupported(f"a test passes a {type(value).__name__} to the response's code; only plain data can be sent")


def _raise(answer: dict[str, Any]) -> NoReturn:
    """Raise what the response's code has raised, as the nearest built-in exception."""
    text = str(answer.get("text"))
    error = Exception(text)
    for name in answer["raised"]:
        kind = vars(builtins).get(str(name))
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(text)
                break
            except TypeError:  # such as UnicodeDecodeError, which takes more; its base class will do
                continue
    error.add_note(_RAISED_THERE)
    raise error


_RAISED_THERE = "raised by the response's code"


def _change(argument: Any, after: Any) -> None:
    """Make an argument what the call has made of it; only the types that the response's process may change."""
    if type(argument) is not type(after):
        return
    match argument:
        case list() | bytearray():
            argument[:] = after
        case dict() | set():
            argument.clear()
            argument.update(after)
        case _:
            return


class Remote:
    """An object of the response's process."""

    __slots__ = ("_channel", "_ref")

    def __init__(self, channel: _Channel, ref: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_ref", ref)

    def _do(self, what: str, *arguments: Any, **named: Any) -> Any:
        return object.__getattribute__(self, "_channel").do(
            what, object.__getattribute__(self, "_ref"), *arguments, **named
        )

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._do("call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delitem", key)

    def __contains__(self, item: Any) -> bool:
        return self._do("contains", item) is True

    def __len__(self) -> int:
        return self._do("len")

    def __iter__(self) -> Iterator[Any]:
        iterator = self._do("iter")
        while True:
            try:
                yield iterator._do("next") if isinstance(iterator, Remote) else next(iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._do("next")

    def __str__(self) -> str:
        return self._do("str")

    def __repr__(self) -> str:
        return self._do("repr")

    def _opaque(self, *others: Any) -> NoReturn:
        raise Opaque("a test compares an object of the response's own; it has to compare plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _opaque
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _opaque
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = __int__ = __float__ = __index__ = _opaque
    __round__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __pow__ = __rpow__ = _opaque


def _result(channel: _Channel, source: str, names: list[str]) -> tuple[str, str]:
    """Run one test; return the outcome and the reason."""
    try:
        space: dict[str, Any] = {"__name__": "tests"}
        for name in names:
            space[name] = channel.name(name)
        exec(compile(source, "test", "exec"), space)
    except Gone as error:
        return "gone", str(error)
    except Unsupported as error:
        return "fault", str(error)
    except BaseException as error:  # noqa: BLE001 (whatever it is, the test has not passed)
        there = _RAISED_THERE in getattr(error, "__notes__", ())
        outcome = "wrong" if not there else "memory" if isinstance(error, MemoryError) else "crash"
        return outcome, f"{type(error).__name__}: {error}"
    return ("right", "") if channel.gone is None else ("gone", str(channel.gone))


def main() -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no result
    with open(TESTS, encoding="utf-8") as file:
        tests: list[dict[str, Any]] = json.load(file)
    channel = _Channel(socket.socket(fileno=_CHANNEL))
    outcome, why = "right", ""
    for number, test in enumerate(tests, start=1):
        outcome, why = _result(channel, test["source"], test["names"])
        if outcome != "right":
            why = f"test {number}: {why}"
            break
    json.dump({"outcome": outcome, "why": why[:500]}, output)
    output.flush()
    os._exit(0)
