"""The check for quantized weights in an HF directory, which slime cannot read.

- Used by: a rule, for every directory on the command line, and the code that loads weights.
- Invariant: files are read only as JSON, and an empty description means that nothing is quantized.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from slime.core.small_files import read_json_object

KEYS = ("quantization_config", "compression_config")
"""The keys of config.json that describe quantization, at the top level or in a sub-model such as `text_config`."""
FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
)
"""Separate files that ModelOpt, GPTQ, AWQ and others write and that engines read."""
METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "model_quant_type", "format", "bits", "w_bit")
REMEDY = "use the model's bf16 or fp32 release, or dequantize it first"


def quantization(directory: str | Path) -> str | None:
    """Return file, key and method of the quantization in a directory, or None if nothing describes one.

    >>> quantization(directory)
    'config.json has quantization_config (quant_method fp8), but quantized weights are not supported'
    """
    root = Path(directory)
    for where, value in _described(root):
        if value:
            return f"{where} ({_method(value)}), but quantized weights are not supported"
    return None


def refuse_quantized(directory: str | Path) -> None:
    """Raise ValueError with directory, file, method and remedy if the directory's weights are quantized."""
    found = quantization(directory)
    if found is not None:
        raise ValueError(f"{directory}: {found}; {REMEDY}")


def _described(root: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each description of a quantization."""
    config = _read(root / "config.json")
    if isinstance(config, dict):
        for key, value in _search(cast(dict[str, Any], config), depth=3):
            yield f"config.json has {key}", value
    for name in FILES:
        if os.path.lexists(root / name):
            yield f"there is {name}", _read(root / name)


def _search(config: Mapping[str, Any], *, depth: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in KEYS:
            yield prefix + key, value
        elif isinstance(value, dict) and depth:
            yield from _search(cast(dict[str, Any], value), depth=depth - 1, prefix=f"{prefix}{key}.")


def _read(path: Path) -> Any:
    """Return a file's JSON.

    An unreadable file counts as the description of a quantization. An unreadable config.json gives None, because
    another rule reports it.
    """
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        return None if path.name == "config.json" else f"it cannot be read: {error}"


def _method(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    fields = cast(dict[str, Any], value)
    for key in METHOD_KEYS:
        if fields.get(key) not in (None, ""):
            return f"{key} {fields[key]}"
    nested = [_method(inner) for inner in fields.values() if isinstance(inner, dict) and inner]
    return next((method for method in nested if method != "no method named"), "no method named")
