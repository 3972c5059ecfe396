"""Fields of numbers that are stored as numpy arrays and read as lists.

- Used by: `sample` and `engine.protocol` declare their per-token fields with `keep_as_arrays`. Our own code reads and
  writes the arrays (`array_of`, `set_array`); users' code sees lists.
- Invariant: an attribute that is read is an ordinary list, and the object holds that same list from then on, so all
  that lists do works: `+=`, `==`, slices, `json.dumps`. A stored array is never changed in place, so copies share it.

A response of 100,000 tokens has three such fields. As lists they are 9 MB of Python objects, as arrays 1.6 MB. A class
of our own that only behaves like a list would be quiet about what it cannot do: `json.dumps` writes a subclass of list
from memory that the subclass does not use, and `array + list` adds the numbers. So a list is made when one is asked
for, and only then:

    engine's answer --> array --> array --> training batch      no list on this way
                          +-- sample.tokens --> list            made once; it replaces the array
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class _ListField:
    """The attribute of one field. It is stored in the object's `__dict__` under the field's own name."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, np.dtype(dtype)

    def __get__(self, owner: object | None, _: type | None = None) -> Any:
        if owner is None:
            return self
        held = vars(owner)
        try:
            values = held[self.name]
        except KeyError:
            raise AttributeError(self.name) from None
        if isinstance(values, np.ndarray):
            values = held[self.name] = cast(Array, values).tolist()
        return values

    def __set__(self, owner: object, values: Any) -> None:
        """Store what was assigned; an array or a tensor is copied, because its owner may write into it."""
        if hasattr(values, "__array__"):
            values = _frozen(self.to_array(np.asarray(values).copy()))
        vars(owner)[self.name] = values

    def to_array(self, values: Any) -> Array:
        """Return numbers as an array: whole numbers in the declared dtype, others in float64.

        Raises:
            ValueError: an entry is no number, or in a field of whole numbers not one, or it does not fit the dtype.
        """
        if isinstance(values, np.ndarray):
            found = cast(Array, values)
        elif self.dtype.kind == "i":
            found = _checked(self.name, "whole numbers", lambda: array("q", values), np.int64)
        else:
            found = _checked(self.name, "numbers", lambda: array("d", values), np.float64)
        if found.ndim != 1 or found.dtype.kind not in ("iub" if self.dtype.kind == "i" else "iubf"):
            raise ValueError(f"{self.name} is an array of {found.dtype} with shape {list(found.shape)}")
        if self.dtype.kind == "i" and found.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if len(found) and not (limits.min <= found.min() and found.max() <= limits.max):
                raise ValueError(f"{self.name} holds numbers that {self.dtype} cannot hold")
            found = found.astype(self.dtype)
        return found


def _checked(name: str, kind: str, make: Any, dtype: type[np.generic]) -> Array:
    try:
        return np.frombuffer(make(), dtype=dtype)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} has to be a list of {kind}: {error}") from error


def _frozen(values: Array) -> Array:
    values.flags.writeable = False
    return values


def keep_as_arrays(cls: type, dtypes: Mapping[str, str]) -> None:
    """Make these fields of a dataclass list fields; call it once the class exists.

    Args:
        dtypes: the dtype of each field's array: a signed one for whole numbers, or float64.
    """
    for name, dtype in dtypes.items():
        setattr(cls, name, _ListField(name, dtype))


def stored(owner: object, name: str) -> Any:
    """Return the field as it is stored, a list or an array or None; it must not be changed."""
    return vars(owner)[name]


def array_of(owner: object, name: str) -> Array | None:
    """Return the field as an array, which must not be changed; None if the field is None.

    Raises:
        ValueError: the field is a list with an entry that it cannot hold.
    """
    values = stored(owner, name)
    if values is None or isinstance(values, np.ndarray):
        return cast("Array | None", values)
    return _field(owner, name).to_array(values)


def set_array(owner: object, name: str, values: Sequence[float] | Array | None) -> None:
    """Store numbers as an array; one that is given is not copied, so nobody may change it from now on."""
    vars(owner)[name] = None if values is None else _frozen(_field(owner, name).to_array(values))


def list_of(owner: object, name: str) -> Any:
    """Return the field as a new list, or None; unlike reading the attribute, this leaves a stored array as it is."""
    values = stored(owner, name)
    return cast(Array, values).tolist() if isinstance(values, np.ndarray) else None if values is None else list(values)


def _field(owner: object, name: str) -> _ListField:
    return getattr(type(owner), name)
