"""The version of megatron-core that this code is written for, and the check of the one that an import would load.

- Used by: `rules.imports`, before anything starts; `slime.megatron` at its import, in every process that trains.
- Invariant: nothing of megatron-core runs here. A Megatron-LM tree on PYTHONPATH would be imported instead of the
  installed wheel; it is checked like one, and named if it is wrong.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_MEGATRON = "0.16.1"


@dataclass(frozen=True)
class MegatronFault:
    """Why training could not import Megatron: the place, the rule that is broken, and the remedy."""

    where: str
    rule: str
    is_missing: bool = False
    """Whether there is no megatron-core at all."""
    remedy: str = f"install megatron-core=={SUPPORTED_MEGATRON}, and take another Megatron-LM off PYTHONPATH"

    def __str__(self) -> str:
        return f"{self.where} {self.rule}; {self.remedy}"


def megatron_fault() -> MegatronFault | None:
    """Return what is wrong with the megatron.core that an import would load; None if it is the supported version."""
    found = importlib.util.find_spec("megatron")
    folders = [Path(folder) / "core" for folder in (found.submodule_search_locations or [])] if found else []
    core = next((folder for folder in folders if (folder / "__init__.py").is_file()), None)
    if core is None:
        return MegatronFault("megatron-core", "is not installed", is_missing=True)
    file = core / "package_info.py"
    version = _read_version(file)
    if version != SUPPORTED_MEGATRON:
        return MegatronFault(f"megatron-core at {file}", f"is version {version}, not {SUPPORTED_MEGATRON}")
    return None


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
