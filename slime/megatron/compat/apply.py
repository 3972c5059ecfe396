"""The only way in which slime changes Megatron and torch: each change names a row of `patches.TABLE`.

- Used by: `parallel.init_parallel` calls `install` when a trainer starts, before the first use of megatron-core; what
  replaces one of Megatron's functions or classes does so through the other functions.
- Invariant: only names in the table can be replaced here, and no other code replaces any. Importing slime.megatron
  changes nothing in an imported Megatron.
"""

from __future__ import annotations

import importlib
import logging
import re
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from slime.config.megatron_version import SUPPORTED_MEGATRON
from slime.megatron.compat.names import Names
from slime.megatron.compat.patches import TABLE

_UNKNOWN_MLP = "Unknown MLP type"


def install() -> None:
    """Check every name that slime relies on, and make the changes that all models need; call it before one is built.

    Raises:
        RuntimeError: the installed Megatron or torch lacks a name of `patches.TABLE`.
    """
    require_all()
    if not hasattr(moe_utils, "te_general_gemm"):
        define("megatron.core.transformer.moe.moe_utils", "te_general_gemm", None)
    # Megatron warns once per layer about each MLP class that is not its own; its "default kwargs" are what ours expect.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_not_about_our_mlp)


def _is_not_about_our_mlp(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_UNKNOWN_MLP)


def require_all(table: tuple[Names, ...] = TABLE) -> None:
    """Check that the installed Megatron and torch have every name of the table.

    Raises:
        RuntimeError: one is missing; the message names its owner, and the version that slime is written for.
    """
    for row in table:
        if row.how == "elsewhere" or (row.cuda_only and not torch.cuda.is_available()):
            continue
        for name in row.names:
            if row.how == "has":
                _require(row.target, name)
            elif not re.search(rf"\b{re.escape(name)}\b", _source(row.target)):
                raise RuntimeError(_missing(row.target, name))


def replace(target: str, name: str, value: Any) -> None:
    """Replace a name of a module or class of the table."""
    owner = _require(target, name)
    _in_table(target, name)
    setattr(owner, name, value)


def define(target: str, name: str, value: Any) -> None:
    """Give a module a name that its code reads, but that it defines only where another package is installed."""
    assert _in_table(target, name).how == "mentions"
    setattr(_resolve(target), name, value)


def replace_on(instance: Any, name: str, value: Any) -> None:
    """Replace a name of one object, whose class or whose class's module has a row in the table."""
    if not hasattr(instance, name):
        raise RuntimeError(_missing(type(instance).__qualname__, name))
    assert any(name in row.names for row in TABLE if _covers(row, instance)), f"{name} is not in the table"
    setattr(instance, name, value)


def change_class(instance: Any, cls: type[Any]) -> None:
    """Make `instance` an object of `cls`, with the attributes that it has."""
    assert any("__class__" in row.names for row in TABLE if _covers(row, instance)), "the class is not in the table"
    instance.__class__ = cls


def _covers(row: Names, instance: Any) -> bool:
    if row.how == "elsewhere":
        return False
    if row.how == "mentions":
        return any(base.__module__ == row.target for base in type(instance).__mro__)
    owner = _resolve(row.target)
    return isinstance(owner, type) and isinstance(instance, owner)


def _in_table(target: str, name: str) -> Names:
    [row] = [row for row in TABLE if row.target == target and name in row.names]
    return row


def _require(target: str, name: str) -> Any:
    owner = _resolve(target)
    if not hasattr(owner, name):
        raise RuntimeError(_missing(getattr(owner, "__name__", target), name))
    return owner


def _missing(owner: str, name: str) -> str:
    return (
        f"{owner} has no {name!r}: slime is written for megatron-core {SUPPORTED_MEGATRON}; "
        f"install that version (pip install megatron-core=={SUPPORTED_MEGATRON})"
    )


def _resolve(target: str) -> Any:
    """Return the module or class at a dotted path."""
    first, *rest = target.split(".")
    path, owner = first, importlib.import_module(first)
    for part in rest:
        path = f"{path}.{part}"
        if isinstance(owner, ModuleType) and hasattr(owner, "__path__") and PathFinder.find_spec(path, owner.__path__):
            owner = importlib.import_module(path)
            continue
        if not hasattr(owner, part):
            raise RuntimeError(_missing(getattr(owner, "__name__", target), part))
        owner = getattr(owner, part)
    return owner


def _source(module: str) -> str:
    """Return the text of a module's file, also where another module has taken its place."""
    package, _, last = module.rpartition(".")
    found = PathFinder.find_spec(module, _resolve(package).__path__)
    if found is None or found.origin is None:
        raise RuntimeError(_missing(package, last))
    return Path(found.origin).read_text(encoding="utf-8")
