"""Groups of samples as columns: numpy arrays for what is long, JSON for the rest.

- Used by: the data side's state in a checkpoint, which may hold thousands of partly generated samples.
- Invariant: `from_columns(to_columns(groups))` has the same values in every field, to the bit: `None` is not an empty
  list, 1 is neither 1.0 nor True, nan, -0.0 and lone surrogates stay what they are. A field needs no declaration here.

Each field of `Sample` is one column with N entries, each of a kind. The entries of one kind lie in one flat array:

    json      anything else: an index into a list of JSON values. Objects that samples share (rows) stay shared
    numbers   an array with one axis, such as list fields that nobody has read. It comes back in its own dtype
    int       a list of whole numbers
    float     a list of floats
    bool      a list of truth values
    text      UTF-8
    array     the bytes of any other array of numbers, whose dtype and shape are JSON

Numbers are written in the smallest signed dtype that holds all of them; floats as float32 if that is exact for all of
them, as it is for an engine's log-probs.

Example: two samples with the masks [1, 0] and None.

>>> columns = to_columns([[Sample(loss_mask=[1, 0]), Sample()]])
>>> mask = columns["fields"]["loss_mask"]
>>> [KINDS[kind] for kind in mask["kinds"]], mask["lengths"].tolist(), mask["int"]
(['int', 'json'], [2, 0], array([1, 0], dtype=int8))
>>> [sample.loss_mask for sample in from_columns(columns)[0]]
[[1, 0], None]

Shapes: _G groups, _N samples.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, cast

import numpy as np

from slime.core.columns import Array
from slime.core.sample import Sample

KINDS = ("json", "numbers", "int", "float", "bool", "text", "array")
"""The kinds of an entry; a column stores them as indices."""
_JSON, _NUMBERS, _INT, _FLOAT, _BOOL, _TEXT, _ARRAY = range(len(KINDS))
_FLAT = {"numbers": "bif", "int": "i", "float": "f", "bool": "b", "text": "u", "array": "u"}
"""The kinds of dtype that the flat array of each kind may have."""
_LIKE = "numbers_like"
"""An empty array in a column, of the dtype in which its arrays come back."""
_INTS = (np.int8, np.int16, np.int32, np.int64)
_ARRAY_DTYPE = re.compile(r"[<|][biuf][1248]")


def to_columns(groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Return the groups as a dict of dicts of arrays, which share nothing with the samples.

    Raises:
        TypeError, ValueError: a value is neither plain data nor an array of numbers.
    """
    samples = list(chain.from_iterable(groups))
    return {
        "group_sizes": np.array([len(group) for group in groups], dtype=np.int64),
        "fields": {each.name: _column([vars(sample)[each.name] for sample in samples]) for each in fields(Sample)},
    }


def from_columns(state: dict[str, Any] | list[list[dict[str, Any]]]) -> list[list[Sample]]:
    """Undo `to_columns`; also read the lists of dicts (`Sample.to_dict`) of earlier checkpoints.

    Raises:
        ValueError: a column is not a field of Sample, or the arrays do not fit together.
    """
    if isinstance(state, list):
        return [[Sample.from_dict(sample) for sample in group] for group in state]
    where, columns = "group_sizes", dict[str, list[Any]]()
    try:
        sizes_G = _whole_numbers(state["group_sizes"])
        for where, column in state["fields"].items():
            columns[where] = _entries(column)
    except (KeyError, AttributeError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"the stored samples cannot be read: {where}: {type(error).__name__}: {error}") from error
    num_samples = sum(sizes_G)
    wrong = {name: len(entries) for name, entries in columns.items() if len(entries) != num_samples}
    if wrong:
        raise ValueError(f"the stored samples cannot be read: {num_samples} in groups, but columns of {wrong}")
    routes_N = columns.pop("routed_experts", [None] * num_samples)
    samples: Iterator[Sample] = (
        _sample({name: entries[n] for name, entries in columns.items()}, routes_N[n]) for n in range(num_samples)
    )
    return [[next(samples) for _ in range(size)] for size in sizes_G]


def _sample(data: dict[str, Any], routes: Any) -> Sample:
    sample = Sample.from_dict(data)
    sample.routed_experts = routes
    return sample


def _column(values_N: Sequence[Any]) -> dict[str, Array]:
    """Return one field of all samples: its kinds and lengths, and a flat array for each kind that occurs."""
    parts: dict[int, list[Any]] = {}
    kinds, lengths = np.zeros(len(values_N), dtype=np.uint8), np.zeros(len(values_N), dtype=np.int64)
    table: list[Any] = []
    which: list[int] = []
    known: dict[int, int] = {}
    like: Array | None = None
    for n, value in enumerate(values_N):
        kind, part = _part(value, like)
        kinds[n] = kind
        if kind == _NUMBERS and like is None:
            like = value[:0].copy()
        if kind == _JSON:  # `table` keeps the objects alive, so an id belongs to one object only
            place = known.setdefault(id(value), len(table))
            if place == len(table):
                table.append(value)
            which.append(place)
            continue
        lengths[n] = len(part)
        parts.setdefault(kind, []).append(part)
        if kind == _ARRAY:
            which.append(len(table))
            table.append({"dtype": _little_endian(value).str, "shape": list(value.shape)})
    column: dict[str, Array] = {"kinds": kinds, "lengths": lengths}
    if like is not None:
        column[_LIKE] = like
    if which:
        column["json"] = np.frombuffer(json.dumps({"values": table, "which": which}).encode(), dtype=np.uint8)
    return column | {KINDS[kind]: _joined(kind, found) for kind, found in parts.items()}


def _part(value: Any, like: Array | None) -> tuple[int, Any]:
    """Return an entry's kind, and what it adds to the flat array of that kind; `numbers` have the dtype of `like`."""
    if isinstance(value, str):
        return _TEXT, value.encode("utf-8", "surrogatepass")
    if isinstance(value, np.ndarray):
        array = cast(Array, value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"an array of {array.dtype} cannot be stored")
        if array.ndim == 1 and array.dtype.kind in "bif" and (like is None or array.dtype == like.dtype):
            return _NUMBERS, _smallest(array)
        return _ARRAY, np.ascontiguousarray(array, dtype=_little_endian(array)).tobytes()
    if isinstance(value, list):
        return _part_of_list(cast(list[Any], value))
    return _JSON, None


def _part_of_list(values: list[Any]) -> tuple[int, Any]:
    first = values[0] if values else 0
    if type(first) is bool:
        return (_BOOL, np.array(values)) if set(map(type, values)) == {bool} else (_JSON, None)
    if not isinstance(first, int | float):
        return _JSON, None
    own, kind, code = (int, _INT, "q") if isinstance(first, int) else (float, _FLOAT, "d")
    try:  # the fastest way to turn a list into numbers
        numbers = np.frombuffer(struct.pack(f"{len(values)}{code}", *values), dtype=code)
    except (struct.error, OverflowError):  # other types, or whole numbers of more than 64 bits
        return _JSON, None
    # `pack` also takes True for 1, and 2 for 2.0: look at the entries that may have been such
    doubtful = (numbers == 0) | (numbers == 1) if own is int else numbers == np.trunc(numbers)
    types = set(map(type, map(values.__getitem__, np.flatnonzero(doubtful).tolist())))
    if any(each is bool or not issubclass(each, own) for each in types):
        return _JSON, None
    return kind, _smallest(numbers)


def _smallest(numbers: Array) -> Array:
    """Return a copy in the smallest dtype that holds the numbers exactly."""
    if numbers.dtype.kind == "i":
        low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
        return numbers.astype(next(i for i in _INTS if np.iinfo(i).min <= low and high <= np.iinfo(i).max))
    if numbers.dtype != np.float64:
        return numbers.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        short = numbers.astype(np.float32)
        exact = np.array_equal(short.astype(np.float64).view(np.int64), numbers.astype(np.float64).view(np.int64))
    return short if exact else numbers.copy()


def _little_endian(array: Array) -> np.dtype[Any]:
    return array.dtype.newbyteorder("<")


def _joined(kind: int, parts: Sequence[Any]) -> Array:
    """Return the flat array of one kind; numbers take the dtype that holds those of all samples."""
    if kind in (_TEXT, _ARRAY):
        return np.frombuffer(b"".join(parts), dtype=np.uint8)
    return np.concatenate(parts, dtype=np.result_type(*{part.dtype for part in parts}))


def _entries(column: dict[str, Array]) -> list[Any]:
    """Return the entries of one column. Its arrays come from a file, so nothing about them is taken for granted."""
    kinds_N, lengths_N = _whole_numbers(column["kinds"]), _whole_numbers(column["lengths"])
    if len(kinds_N) != len(lengths_N) or not set(kinds_N) <= set(range(len(KINDS))):
        raise ValueError("its kinds and lengths do not fit together")
    values = iter(_json_values(column["json"])) if "json" in column else iter(())
    flats = {kind: _flat(column, KINDS[kind]) for kind in sorted(set(kinds_N) - {_JSON})}
    places = dict.fromkeys(flats, 0)
    entries: list[Any] = []
    for kind, length in zip(kinds_N, lengths_N, strict=True):
        if kind == _JSON:
            entries.append(next(values, _JSON_MISSING))
            continue
        begin, end = places[kind], places[kind] + length
        places[kind] = end
        part = flats[kind][begin:end]
        if kind == _TEXT:
            entries.append(part.tobytes().decode("utf-8", "surrogatepass"))
        elif kind == _NUMBERS:
            entries.append(part.astype(column[_LIKE].dtype, casting="safe"))
        elif kind == _ARRAY:
            entries.append(_array(part, next(values, _JSON_MISSING)))
        else:
            entries.append(part.tolist())
    unread = [KINDS[kind] for kind, flat in flats.items() if len(flat) != places[kind]]
    if unread or next(values, _JSON_MISSING) is not _JSON_MISSING or any(each is _JSON_MISSING for each in entries):
        raise ValueError("its values do not have the length of its kinds and lengths")
    return entries


_JSON_MISSING = object()


def _json_values(stored: Array) -> list[Any]:
    document = json.loads(stored.tobytes())
    table, which = document["values"], document["which"]
    if not all(type(place) is int and 0 <= place < len(table) for place in which):
        raise ValueError("its JSON has no such value")
    return [table[place] for place in which]


def _flat(column: dict[str, Array], kind: str) -> Array:
    flat = column[kind]
    if flat.ndim != 1 or flat.dtype.kind not in _FLAT[kind]:
        raise ValueError(f"its {kind} values are {flat.dtype} of shape {list(flat.shape)}")
    return flat


def _array(stored: Array, form: Any) -> Array:
    """Return one array in memory of its own: a view would keep the arrays of all other samples alive."""
    dtype, shape = str(form["dtype"]), [int(size) for size in form["shape"]]
    if _ARRAY_DTYPE.fullmatch(dtype) is None or min(shape, default=0) < 0:
        raise ValueError(f"an array cannot have dtype {dtype} and shape {shape}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(stored):
        raise ValueError(f"an array of dtype {dtype} and shape {shape} has {len(stored)} bytes")
    return np.frombuffer(stored.tobytes(), dtype=dtype).reshape(shape)


def _whole_numbers(stored: Array) -> list[int]:
    if stored.ndim != 1 or stored.dtype.kind not in "iu" or (len(stored) and stored.min() < 0):
        raise ValueError("sizes have to be whole numbers")
    return stored.tolist()
