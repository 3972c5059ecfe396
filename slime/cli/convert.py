"""Convert an HF directory to a torch_dist checkpoint, for --ref-load and --load.

    slime convert --hf-checkpoint HF_DIR --save OUT

    source scripts/models/glm4-9B.sh
    python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint HF_DIR --save OUT

It takes the flags of `slime train`; MODEL_ARGS may be left out, because config.json has them. It runs on the CPU and
holds the model once in memory. Every parallel layout can load the result.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from slime.config.help import show_help
from slime.config.parse import load_args


def main(argv: Sequence[str]) -> None:
    """Convert the directory that the flags name, and print the path of the result.

    Raises:
        ValueError: a flag is wrong or missing, or the directory is not what it should be.
    """
    if not argv or "--help" in argv or "-h" in argv:
        show_help(__doc__ or "")
        return
    start = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it first looks for a device
    args, warnings = load_args(argv, training=False)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.hf_checkpoint is None or args.save is None:
        raise ValueError("--hf-checkpoint and --save: the converter reads one and writes the other; give both")
    from slime.megatron.checkpoint.conversion import hf_to_torch_dist

    path = hf_to_torch_dist(args, args.hf_checkpoint, args.save)
    print(f"{args.hf_checkpoint} -> {path} ({time.monotonic() - start:.1f} s)")
