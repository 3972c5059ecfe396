"""The program in which the response's code runs: it executes `solution.py`, then serves calls of what that defines.

- Run by: `judging`, in a sandbox of its own. `asserting`, in another sandbox, is at the other end of the channel.
- Invariant: none. The response's code can do what it likes with this process: answering calls is all that it is for,
  and it learns only the arguments of the calls.
"""

from __future__ import annotations

import operator
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from slime.sandbox.wire import Gone, decode, encode, receive, send

_CHANNEL = 3
MUTABLE = (list, dict, set, bytearray)
"""Arguments of these types are sent back after a call, as far as the call has changed them."""
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem, "contains": operator.contains, "len": len, "iter": iter, "next": next, "str": str,
    "repr": repr,
}  # fmt: skip


class _Objects:
    """The objects that the other side refers to by number."""

    def __init__(self) -> None:
        self._all: list[Any] = []

    def refer(self, value: Any) -> int:
        self._all.append(value)
        return len(self._all) - 1

    def find(self, number: int) -> Any:
        return self._all[number]


def _answer(request: Any, module: types.ModuleType, objects: _Objects) -> dict[str, Any]:
    if request["do"] == "name":
        value = vars(module).get(request["name"], objects)
        return {"missing": True} if value is objects else {"value": encode(value, objects.refer)}
    target = objects.find(request["ref"])
    arguments = [decode(each, objects.find) for each in request["arguments"]]
    named = {name: decode(each, objects.find) for name, each in request.get("named", {}).items()}
    value = target(*arguments, **named) if request["do"] == "call" else _OPERATIONS[request["do"]](target, *arguments)
    changed = {
        str(place): after
        for place, (before, argument) in enumerate(zip(request["arguments"], arguments, strict=True))
        if type(argument) in MUTABLE and (after := encode(argument, objects.refer)) != before
    }
    return {"value": encode(value, objects.refer), "changed": changed}


def main() -> None:
    connection = socket.socket(fileno=_CHANNEL)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    with open("solution.py", encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    exec(compile(source, "solution.py", "exec"), vars(module))
    objects = _Objects()
    while True:
        try:
            request = receive(connection)
        except Gone:  # all tests are done
            return
        try:
            answer = _answer(request, module, objects)
            send(connection, answer)
        except Exception as error:  # noqa: BLE001 (whatever the call raises goes to the test that made it)
            kinds = [kind.__name__ for kind in type(error).__mro__]
            send(connection, {"raised": kinds, "text": str(error)[:500]})
