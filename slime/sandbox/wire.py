"""How the two programs that run asserts talk: requests and answers as JSON over a socket, values as plain data.

- Used by: `asserting` and `serving`, inside two sandboxes. It imports only the standard library.
- Invariant: decoding gives exactly the built-in types (and Decimal and Fraction), never a subclass or an object with
  methods of its own. So a comparison of decoded values runs no code of the process that sent them. Whatever else a
  value is, it is sent as a reference, a number that means something only to its owner.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

MOST = 8 << 20
"""The most bytes of one message."""
_EXACT = 2**53
_LENGTH = struct.Struct("=I")


class Gone(BaseException):
    """The other process has ended or does not speak the protocol. A test's `except Exception` does not catch it."""


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """Convert a value to JSON types; subclasses of the built-in types become those types. `refer` numbers the rest.

    >>> encode((1, {2.5}), lambda value: 0)
    {'tuple': [1, {'set': [{'float': '0x1.4000000000000p+1'}]}]}
    """
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value) if -_EXACT < value < _EXACT else {"int": hex(value)}
        case float():
            return {"float": float.hex(value)}
        case complex():
            return {"complex": [float.hex(value.real), float.hex(value.imag)]}
        case bytes() | bytearray():
            return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
        case range():
            return {"range": [encode(part, refer) for part in (value.start, value.stop, value.step)]}
        case list():
            return [encode(item, refer) for item in list.__iter__(value)]
        case tuple() | set() | frozenset():
            kinds: tuple[type, ...] = (tuple, set, frozenset)
            kind = next(kind for kind in kinds if isinstance(value, kind))
            return {kind.__name__: [encode(item, refer) for item in value]}
        case dict():
            return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
        case _ if type(value).__module__ == "decimal" and type(value).__name__ == "Decimal":
            return {"decimal": str(value)}
        case _ if type(value).__module__ == "fractions" and type(value).__name__ == "Fraction":
            return {"fraction": [hex(value.numerator), hex(value.denominator)]}
        case _:
            return {"ref": refer(value)}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """Convert back; `find` returns what a reference stands for.

    Raises:
        ValueError, TypeError, KeyError and others: the data is not what `encode` makes.
    """
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    [(kind, value)] = data.items()
    match kind:
        case "int":
            return int(value, 16)
        case "float":
            return float.fromhex(value)
        case "complex":
            return complex(float.fromhex(value[0]), float.fromhex(value[1]))
        case "bytes" | "bytearray":
            return bytes.fromhex(value) if kind == "bytes" else bytearray.fromhex(value)
        case "range":
            return range(*[decode(part, find) for part in value])
        case "tuple" | "set" | "frozenset":
            items = [decode(item, find) for item in value]
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
        case "dict":
            return {decode(key, find): decode(item, find) for key, item in value}
        case "decimal":
            from decimal import Decimal  # only where it is needed: importing takes milliseconds

            return Decimal(value)
        case "fraction":
            from fractions import Fraction

            return Fraction(int(value[0], 16), int(value[1], 16))
        case "ref":
            return find(int(value))
        case _:
            raise ValueError(f"unknown kind of value {kind!r}")


def send(connection: socket.socket, message: Any) -> None:
    """Send one message. Raises ValueError if it is too long."""
    data = json.dumps(message).encode()
    if len(data) > MOST:
        raise ValueError(f"a message of {len(data)} bytes; at most {MOST} are sent")
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Return the next message.

    Raises:
        Gone: the connection has ended, or what arrives is no message.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > MOST:
        raise Gone(f"a message of {length} bytes")
    try:
        return json.loads(_exactly(connection, length))
    except (ValueError, RecursionError) as error:
        raise Gone(f"no JSON: {error}") from error


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(1 << 20, length - len(parts)))
        if not part:
            raise Gone("the connection has ended")
        parts += part
    return bytes(parts)
