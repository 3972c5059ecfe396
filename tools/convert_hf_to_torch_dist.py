#!/usr/bin/env python3
"""Convert an HF directory to a torch_dist checkpoint, for --ref-load and --load.

    source scripts/models/glm4-9B.sh
    python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint HF_DIR --save OUT

It takes the flags of train.py; MODEL_ARGS may be left out, because config.json has them. It runs on the CPU and holds
the model once in memory. Every parallel layout can load the result.
"""

from __future__ import annotations

import os
import sys
import time

from slime.config.parse import load_args
from slime.core.errors import RunError


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RunError) as error:
        sys.exit(f"convert_hf_to_torch_dist.py: {error}")
