"""Text and YAML into the typed value of one flag.

Path: called by `parse` for every flag given. Invariant: nothing is evaluated; what is not a value of the flag's type
and range is a ValueError that says what is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, cast

from slime.config.flags.table import BOUNDS, FlagSpec

BOOLEANS = {"true": True, "false": False}


def parse_layer_pattern(text: str) -> int | list[int]:
    """Megatron's `--moe-layer-freq`: a number, a list, or a sum of repeated lists, read without eval.

    `"2"` -> 2, `"[0,1]"` -> [0, 1], `"[0]*1+[1]*45"` -> one 0 and forty-five 1, `"([0]+[1]*2)*3"` -> [0, 1, 1] * 3.
    """
    text = text.strip()
    if re.fullmatch(r"\d+", text):
        return int(text)
    pattern, rest = _layer_sum(re.sub(r"\s+", "", text))
    if rest:
        raise ValueError(f"a number, a list such as [0,1,1] or an expression such as [0]*1+[1]*45, not {rest!r}")
    return pattern


def _layer_sum(text: str) -> tuple[list[int], str]:
    """term {+ term}; what could not be read comes back as the second value."""
    pattern, rest = _layer_term(text)
    while rest.startswith("+"):
        term, rest = _layer_term(rest[1:])
        pattern += term
    return pattern, rest


def _layer_term(text: str) -> tuple[list[int], str]:
    """`[n,...]` or `( sum )`, and any `*n` behind it."""
    if text.startswith("("):
        pattern, rest = _layer_sum(text[1:])
        if not rest.startswith(")"):
            return [], text
        rest = rest[1:]
    else:
        match = re.match(r"\[(\d+(?:,\d+)*)\]", text)
        if match is None:
            return [], text or "(nothing)"
        pattern, rest = [int(number) for number in match[1].split(",")], text[match.end() :]
    while match := re.match(r"\*(\d+)", rest):
        times = int(match[1])
        if times * len(pattern) > 10_000:
            raise ValueError("a pattern for at most 10000 layers")
        pattern, rest = pattern * times, rest[match.end() :]
    return pattern, rest


def _within(value: float, key: str, bound: float) -> bool:
    match key:
        case "ge":
            return value >= bound
        case "gt":
            return value > bound
        case "le":
            return value <= bound
        case _:
            return value < bound


def _suffixed(text: str) -> int:
    """64k -> 64000, 64Ki -> 65536."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMGT])|([0-9]+)([KMGT])i", text)
    if match is None:
        raise ValueError("a whole number, or one such as 64k (64000) or 64Ki (65536)")
    if match[1] is not None:
        return int(Decimal(match[1]) * 1000 ** ("kMGT".index(match[2]) + 1))
    return int(match[3]) * 1024 ** ("KMGT".index(match[4]) + 1)


def _scalar(spec: FlagSpec, text: str) -> Any:
    value: Any = text
    if spec.kind == "int" and spec.suffixes and text[-1:].isalpha():
        value = _suffixed(text)
    elif spec.kind == "int":
        if re.fullmatch(r"[+-]?\d+(_\d+)*", text) is None:
            raise ValueError("a whole number")
        value = int(text)
    elif spec.kind == "float":
        try:
            value = float(text)
        except ValueError:
            raise ValueError("a number") from None
        if value != value:
            raise ValueError("a number")
    elif spec.kind == "layers":
        value = parse_layer_pattern(text)
    if spec.choices and value not in spec.choices:
        raise ValueError("one of " + ", ".join(spec.choices))
    if not all(_within(value, key, bound) for key, bound in spec.bounds.items()):
        limits = [f"{sign} {spec.bounds[key]:g}" for key, sign in BOUNDS.items() if key in spec.bounds]
        raise ValueError("a number " + " and ".join(limits))
    return value


def from_texts(spec: FlagSpec, texts: Sequence[str]) -> Any:
    """The value of a flag from its words on the command line.

    Raises:
        ValueError: its message completes "it takes ...".
    """
    if spec.num_values is None:
        if len(texts) != 1:
            raise ValueError("one value")
        return _scalar(spec, texts[0])
    fewest, most = spec.num_values
    if len(texts) < fewest or (most is not None and len(texts) > most):
        raise ValueError(f"{fewest} values" if fewest == most else f"{fewest} or more values")
    values = [_scalar(spec, text) for text in texts]
    if spec.one_is_scalar and len(values) == 1:
        return values[0]
    return tuple(values) if spec.source == "slime" else values


def from_yaml(spec: FlagSpec, value: Any) -> Any:
    """The value of a flag from a YAML file. Raises ValueError as `from_texts`."""
    if value is None and spec.optional:
        return None
    if spec.kind == "bool":
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if spec.kind == "layers" and isinstance(value, list):
        return parse_layer_pattern(str(cast(list[Any], value)))
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    if any(isinstance(item, bool | dict | list | None) for item in items):
        raise ValueError("a list of values" if spec.num_values else "a value")
    if isinstance(value, list) and spec.num_values is None:
        raise ValueError("one value, not a list")
    if not items and spec.num_values is not None:
        return () if spec.source == "slime" else []
    return from_texts(spec, [str(item) for item in items])
