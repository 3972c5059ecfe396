"""Whether an HF directory holds quantized weights, which nothing here reads.

Path: a rule asks for every directory on the command line, and what loads weights asks again. Invariant: files are read
as JSON alone, and an empty description means that nothing is quantized.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from slime.core.small_files import read_json_object

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, at its top or in the part of a sub-model such as `text_config`."""
FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
)
"""Files of their own that ModelOpt, GPTQ, AWQ and others write, and that engines look for."""
METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "model_quant_type", "format", "bits", "w_bit")
REMEDY = "take the model's bf16 or fp32 release, or dequantize it first"


def quantization(directory: str | Path) -> str | None:
    """How the weights in a directory are quantized, by file, key and method; None: they are not, as far as it says.

    >>> quantization(directory)
    'config.json has quantization_config (quant_method fp8), and quantized weights are not supported'
    """
    root = Path(directory)
    for where, value in _described(root):
        if value:
            return f"{where} ({_method(value)}), and quantized weights are not supported"
    return None


def refuse_quantized(directory: str | Path) -> None:
    """Raise ValueError with directory, file, method and remedy where its weights are quantized."""
    found = quantization(directory)
    if found is not None:
        raise ValueError(f"{directory}: {found}; {REMEDY}")


def _described(root: Path) -> Iterator[tuple[str, Any]]:
    """Every description: where it is, and its value."""
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
    """A file's JSON. One that cannot be read describes something: config.json's faults are another rule's error."""
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
