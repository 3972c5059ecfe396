"""The version of megatron-core that this code is written for.

- Used by: `slime.megatron` checks it at import, before anything of megatron.core is imported.
- Invariant: nothing of megatron-core runs here. A Megatron-LM tree on PYTHONPATH would be imported instead of the
  installed wheel; it is checked like one, and named if it is wrong.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

SUPPORTED_MEGATRON = "0.16.1"


def check_megatron_version() -> None:
    """Check the version of the megatron.core that an import would load.

    Raises:
        ValueError: there is none, or it has another version; the message names its file and version.
    """
    remedy = f"install megatron-core=={SUPPORTED_MEGATRON}, and take another Megatron-LM off PYTHONPATH"
    found = importlib.util.find_spec("megatron")
    folders = [Path(folder) / "core" for folder in (found.submodule_search_locations or [])] if found else []
    core = next((folder for folder in folders if (folder / "__init__.py").is_file()), None)
    if core is None:
        raise ValueError(f"megatron-core is not installed; {remedy}")
    file = core / "package_info.py"
    version = _read_version(file)
    if version != SUPPORTED_MEGATRON:
        raise ValueError(f"megatron-core at {file} is version {version}, not {SUPPORTED_MEGATRON}; {remedy}")


def _read_version(file: Path) -> str:
    """Return the version that `package_info.py` declares in MAJOR, MINOR, PATCH and PRE_RELEASE; parsed, not run."""
    if not file.is_file():
        return "unknown"
    values: dict[str, object] = {}
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            values |= {target.id: statement.value.value for target in statement.targets if isinstance(target, ast.Name)}
    if not {"MAJOR", "MINOR", "PATCH"} <= values.keys():
        return "unknown"
    return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"
