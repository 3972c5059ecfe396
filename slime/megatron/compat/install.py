"""What a trainer changes in Megatron and torch when it starts, before it builds a model.

- Used by: `parallel.init_parallel`, before the first use of megatron-core; optimizers make their own changes when they
  are built, through `apply`.
- Invariant: importing slime.megatron changes nothing in an imported Megatron; this function does, and a second call has
  no further effect.
"""

from __future__ import annotations

import logging

from megatron.core.transformer.moe import moe_utils

from slime.megatron.compat import apply, cpu_layer

_UNKNOWN_MLP = "Unknown MLP type"


def install() -> None:
    """Check every name that slime relies on, and put the changes in place that all models need.

    Raises:
        RuntimeError: the installed Megatron or torch lacks a name of `patches.TABLE`.
    """
    apply.require_all()
    cpu_layer.install()
    if not hasattr(moe_utils, "te_general_gemm"):
        apply.define("megatron.core.transformer.moe.moe_utils", "te_general_gemm", None)
    # Megatron warns once per layer about each MLP class that is not its own; its "default kwargs" are what ours expect.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_not_about_our_mlp)


def _is_not_about_our_mlp(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_UNKNOWN_MLP)
