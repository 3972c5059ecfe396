"""Ways to start a trainer, each in a process that has imported torch and nothing else: what each one loads and changes.

`python tests/megatron/starts_for_tests.py` prints one JSON object with what was found, by the name of the start.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import sys
import types
from multiprocessing.connection import Connection
from typing import Any

STARTS = {
    "trainer": ("slime.megatron.trainer",),
    "after a tracker": ("torch.utils.tensorboard", "slime.megatron.trainer"),
    "megatron-core first": ("megatron.core.timers", "slime.megatron.model.build"),
}
TRACKERS = ("wandb", "torch.utils.tensorboard")


def look(start: str) -> dict[str, Any]:
    """Import the modules of one start, and return what a trainer depends on."""
    for name in STARTS[start]:
        importlib.import_module(name)
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    found: dict[str, Any] = {
        "trackers": [name for name in TRACKERS if name in sys.modules],
        "plain function": type(swiglu) is types.FunctionType and not hasattr(swiglu, "_torchdynamo_orig_callable"),
        "compiler": "torch._inductor.compile_fx" in sys.modules,
    }
    return found | (after_the_start() if start == "trainer" else {})


def after_the_start() -> dict[str, Any]:
    """Return what `install` changes, and whether a hook in a trainer can use the trackers."""
    from megatron.core.transformer.moe import moe_utils

    from slime.megatron.compat.apply import install

    log = logging.getLogger("megatron.core.transformer.transformer_layer")
    patches = [(hasattr(moe_utils, "te_general_gemm"), len(log.filters))]
    install()
    install()
    patches.append((hasattr(moe_utils, "te_general_gemm"), len(log.filters)))

    import wandb
    from torch.utils.tensorboard import SummaryWriter
    from wandb.sdk.lib import runid

    return {"patches": patches, "used": [len(runid.generate_id()), wandb.teardown.__name__, SummaryWriter.__name__]}


def send(start: str, connection: Connection) -> None:
    connection.send(look(start))


def main() -> None:
    import torch  # noqa: F401  (most of the time of each start, and the processes share it)

    context, found = multiprocessing.get_context("fork"), dict[str, Any]()
    for start in STARTS:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=send, args=(start, theirs))
        process.start()
        theirs.close()
        found[start] = ours.recv()
        process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
