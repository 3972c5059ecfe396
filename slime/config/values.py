"""The conversion of text and YAML to the typed value of one flag.

- Used by: `parse`, for every given flag.
- Invariant: nothing is evaluated. A value of a wrong type or range raises a ValueError that describes what is required.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, cast

from slime.config.flags.table import FlagSpec

BOOLEANS = {"true": True, "false": False}
MOST = 2**31 - 1
"""The largest integer for a flag of slime without its own bound, because counts and lengths become C integers."""
MOST_PASSED_ON = 2**63 - 1
"""The largest integer for a flag that is passed on to another program."""
MAX_LAYERS = 10_000
_MAX_PATTERN = 10_000
"""The largest number of characters in a layer pattern."""
_MAX_DEPTH = 50
"""The largest depth of nested parentheses in a layer pattern."""
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse_layer_pattern(text: str) -> int | list[int]:
    """Parse Megatron's --moe-layer-freq, a number, a list or a sum of repeated lists, without eval.

    `"2"` -> 2, `"[0,1]"` -> [0, 1], `"[0]*1+[1]*45"` -> one 0 and forty-five 1, `"([0]+[1]*2)*3"` -> [0, 1, 1] * 3.
    """
    text = re.sub(r"\s+", "", text)
    if len(text) > _MAX_PATTERN:
        raise ValueError(f"a pattern of at most {_MAX_PATTERN} characters")
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    pattern, rest = _layer_sum(text, 0)
    if rest:
        raise ValueError(f"a number, a list such as [0,1,1] or an expression such as [0]*1+[1]*45, not {rest[:80]!r}")
    return pattern


def _layer_sum(text: str, depth: int) -> tuple[list[int], str]:
    """Parse `term {+ term}` and return the pattern and the text that could not be parsed."""
    pattern, rest = _layer_term(text, depth)
    while rest.startswith("+"):
        term, rest = _layer_term(rest[1:], depth)
        pattern += term
        _check_layers(len(pattern))
    return pattern, rest


def _layer_term(text: str, depth: int) -> tuple[list[int], str]:
    """Parse `[n,...]` or `( sum )`, with any `*n` after it."""
    if text.startswith("("):
        if depth == _MAX_DEPTH:
            raise ValueError(f"a pattern with at most {_MAX_DEPTH} nested parentheses")
        pattern, rest = _layer_sum(text[1:], depth + 1)
        if not rest.startswith(")"):
            return [], text
        rest = rest[1:]
    else:
        match = re.match(r"\[([0-9]{1,9}(?:,[0-9]{1,9})*)\]", text)
        if match is None:
            return [], text or "(nothing)"
        pattern, rest = [int(number) for number in match[1].split(",")], text[match.end() :]
    while match := re.match(r"\*([0-9]{1,9})(?![0-9])", rest):
        times = int(match[1])
        _check_layers(times * len(pattern))
        pattern, rest = pattern * times, rest[match.end() :]
    return pattern, rest


def _check_layers(number: int) -> None:
    if number > MAX_LAYERS:
        raise ValueError(f"a pattern for at most {MAX_LAYERS} layers")


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
    """Convert a number with a suffix: 64k -> 64000, 64Ki -> 65536."""
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,19})?)([kMGT])|([0-9]{1,19})([KMGT])i", text)
    if match is None:
        raise ValueError("a whole number, or one such as 64k (64000) or 64Ki (65536)")
    if match[1] is not None:
        return int(Decimal(match[1]) * 1000 ** ("kMGT".index(match[2]) + 1))
    return int(match[3]) * 1024 ** ("KMGT".index(match[4]) + 1)


def _whole_number(spec: FlagSpec, text: str) -> int:
    if spec.suffixes and text[-1:].isalpha():
        value = _suffixed(text)
    elif re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text) is None:
        raise ValueError("a whole number")
    else:
        value = int(text) if len(text) < 40 else None
    most = MOST_PASSED_ON if spec.source != "slime" else int(spec.bounds.get("le", MOST))
    if value is None or abs(value) > max(most, MOST):
        raise ValueError(f"a whole number of at most {most}")
    return value


def _number(text: str) -> float:
    value = float(text) if _FLOAT.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError("a number" if math.isnan(value) else "a number that a float of 64 bits can hold")
    return value


def _text(text: str) -> str:
    """Return the text if file names, headers and logs can contain it."""
    if "\0" in text:
        raise ValueError("text without NUL characters")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("text in UTF-8") from error
    return text


def _json_object(text: str) -> str:
    """Return the text of a JSON object in one spelling: no spaces, keys in their order."""
    try:
        value: object = json.loads(_text(text), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'a JSON object such as {{"enable_thinking": false}}, in single quotes ({error})') from error
    if not isinstance(value, dict):
        raise ValueError('a JSON object such as {"enable_thinking": false}, in single quotes')
    return json.dumps(value, ensure_ascii=False)


def _with_numbers(value: Any) -> Any:
    """Return a YAML value with numbers for the texts that are numbers in JSON, because YAML files are read as text."""
    if isinstance(value, dict):
        return {str(key): _with_numbers(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in cast(list[Any], value)]
    is_number = isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", value)
    return json.loads(value) if is_number else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _scalar(spec: FlagSpec, text: str) -> Any:
    match spec.kind:
        case "int":
            value: Any = _whole_number(spec, text)
        case "float":
            value = _number(text)
        case "layers":
            value = parse_layer_pattern(text)
        case "json":
            value = _json_object(text)
        case _:
            value = _text(text)
    if spec.choices and value not in spec.choices:
        raise ValueError("one of " + ", ".join(spec.choices))
    if not all(_within(value, key, bound) for key, bound in spec.bounds.items()):
        raise ValueError("a number " + " and ".join(spec.limits))
    return value


def from_texts(spec: FlagSpec, texts: Sequence[str]) -> Any:
    """Return the value of a flag from its words on the command line.

    Raises:
        ValueError: the words are not a value of the flag; the message completes "must be ...".
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
    """Return the value of a flag from a YAML file. Raises ValueError like `from_texts`."""
    if value is None and spec.optional:
        return None
    if spec.kind == "bool":
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if spec.kind == "json" and isinstance(value, dict):
        return _json_object(json.dumps(_with_numbers(value)))
    if spec.kind == "layers" and isinstance(value, list):
        return parse_layer_pattern(f"[{','.join(map(str, cast(list[Any], value)))}]")
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    if any(isinstance(item, bool) for item in items) and spec.kind == "str":
        raise ValueError("text; YAML reads yes, no, on, off, true and false as switches: put it in quotes")
    if any(not isinstance(item, str | int | float) or isinstance(item, bool) for item in items):
        raise ValueError("a list of values" if spec.num_values else "a value")
    if isinstance(value, list) and spec.num_values is None:
        raise ValueError("one value, not a list")
    if not items and spec.num_values is not None and not spec.one_is_scalar:
        return () if spec.source == "slime" else []
    return from_texts(spec, [str(item) for item in items])
