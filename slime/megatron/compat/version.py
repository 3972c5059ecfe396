"""The refusal to import a megatron-core of another version than the one that this code is written for.

- Used by: `slime.megatron` at its import, before anything of megatron.core is imported.
- Invariant: every process that trains refuses what `config.megatron_version` finds, whatever was checked before.
"""

from __future__ import annotations

from slime.config.megatron_version import megatron_fault


def check_megatron_version() -> None:
    """Check the version of the megatron.core that an import would load.

    Raises:
        ValueError: there is none, or it has another version; the message names its file and version.
    """
    fault = megatron_fault()
    if fault is not None:
        raise ValueError(str(fault))
