"""The masking of secrets in a run's arguments, command line, output and logs.

- Used by: the program, which masks its own command line and its output, and every process of the run, which masks its
  log. A flag's declaration marks its secret part (`flag(secret=...)`, `table.secret_part`).
- Invariant: a flag that is declared secret needs no further care anywhere else.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from slime.config.args import Args
from slime.config.flags.flag import Secret
from slime.config.flags.table import FlagSpec, Source, all_flags, spellings
from slime.core.masking import HIDDEN, Masker, mask_urls

T = TypeVar("T")
ENVIRONMENT = "env:"
"""The prefix of a secret flag's value that names the environment variable with the secret."""


def masked(secret: Secret | None, text: str) -> str:
    """Return a flag's value with its secret part masked."""
    if secret == "all":
        return HIDDEN if text else text
    if secret == "url" and "://" not in text:
        return mask_urls(f"x://{text}").removeprefix("x://")
    return mask_urls(text)


def secret_values(values: Mapping[tuple[Source, str], Any]) -> Iterator[str]:
    """Yield every secret string among `values`, which are by (source, name)."""
    for spec in all_flags():
        if spec.secret is not None:
            for text in _texts(values.get((spec.source, spec.name))):
                if spec.secret == "url" and "://" not in text:
                    continue
                yield text
                if spec.name == "control_plane_api_keys":  # ID:NAME:ROLE:KEY
                    yield text.split(":", 3)[-1]


def masker_of(args: Args) -> Masker:
    """Return a function that hides the secrets of `args` in any text."""
    values: dict[tuple[Source, str], Any] = {("slime", name): value for name, value in vars(args).items()}
    passed: list[tuple[Source, Mapping[str, Any]]] = [("sglang", args.sglang), ("router", args.router)]
    for source, mapping in passed:
        values |= {(source, name): value for name, value in mapping.items()}
    return Masker(secret_values(values))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return cast(Sequence[str], value) if isinstance(value, list | tuple) else ()


def from_environment(value: T) -> T:
    """Return a secret flag's value or values; a value `env:NAME` is replaced with the environment variable NAME.

    Raises:
        ValueError: there is no such variable; the message completes "must be ...".
    """
    if isinstance(value, list):
        return cast(T, [from_environment(item) for item in cast(list[Any], value)])
    if not isinstance(value, str) or not value.startswith(ENVIRONMENT):
        return value
    name = value.removeprefix(ENVIRONMENT)
    if name not in os.environ:
        raise ValueError(f"the name of an environment variable after env:, but {name or '(nothing)'} is not set")
    return cast(T, os.environ[name])


def masked_words(words: Sequence[str]) -> list[str]:
    """Return a command line with its secrets replaced; each word keeps its length in bytes."""
    result: list[str] = []
    spec: FlagSpec | None = None
    for word in words:
        spelling, equals, value = word.partition("=")
        if word.startswith("--"):
            spec = spellings()[spelling][0] if spelling in spellings() else None
        else:
            spelling, equals, value = "", "", word
        if (spec is None or spec.secret is None or not value) and mask_urls(value) == value:
            result.append(word)
            continue
        shown = value if value.startswith(ENVIRONMENT) else masked(spec and spec.secret, value)
        length = len(os.fsencode(value))
        result.append(spelling + equals + os.fsdecode(os.fsencode(shown)[:length].ljust(length, b"*")))
    return result


def hide_command_line(argv: Sequence[str]) -> None:
    """Replace the secrets in `argv` where other users of the machine, Ray and trackers read this process's arguments.

    Until this call, others could read them. `env:NAME` and --config keep secrets off the command line altogether.
    """
    changed = {old: new for old, new in zip(argv, masked_words(argv), strict=True) if old != new}
    if not changed:
        return
    for words in (sys.argv, sys.orig_argv):
        words[:] = [changed.get(word, word) for word in words]
    _overwrite({os.fsencode(old): os.fsencode(new) for old, new in changed.items()})


def _overwrite(changed: Mapping[bytes, bytes]) -> None:
    """Overwrite words of /proc/PID/cmdline in place, in the memory that the kernel reads them from (see proc(5))."""
    numbers = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(numbers[45]), int(numbers[46])  # fields 48 and 49, counted from 3 after the name
    if not start < end:
        raise OSError("/proc/self/stat does not give the address of this process's arguments")
    words = ctypes.string_at(start, end - start).split(b"\0")
    text = b"\0".join(changed.get(word, word) for word in words)
    ctypes.memmove(start, text, len(text))
