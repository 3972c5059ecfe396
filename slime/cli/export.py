"""Convert a torch_dist checkpoint to an HF directory.

    slime export --input-dir RUN --origin-hf-dir HF_DIR --output-dir HF_OUT
    python tools/convert_torch_dist_to_hf.py --input-dir OUT/iter_0000059 --origin-hf-dir HF_DIR --output-dir HF_OUT

    --input-dir      a checkpoint, or the --save directory of a run: then the newest one is used (or --ckpt-step N)
    --origin-hf-dir  the HF directory with config, tokenizer and the tensors' dtypes (also: --hf-checkpoint)
    --output-dir     the HF directory to write; an earlier export there is replaced

MODEL_ARGS may follow; config.json has them. It runs on the CPU and holds the model once in memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from slime.config.help import show_help
from slime.config.parse import load_args


def main(argv: Sequence[str]) -> None:
    """Convert the checkpoint that the flags name, and print the path of the result.

    Raises:
        ValueError: a flag is wrong or missing, or there is no checkpoint to convert.
    """
    if not argv or "--help" in argv or "-h" in argv:
        show_help(__doc__ or "")
        return
    start = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it first looks for a device
    parser = argparse.ArgumentParser(prog="slime export", allow_abbrev=False, add_help=False)
    parser.add_argument("--input-dir", required=True)
    parser.add_argument("--origin-hf-dir", "--hf-checkpoint", required=True)
    parser.add_argument("--output-dir", required=True)
    own, rest = parser.parse_known_args(argv)
    args, warnings = load_args(["--hf-checkpoint", own.origin_hf_dir, *rest], training=False)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    from slime.megatron.checkpoint.conversion import torch_dist_to_hf
    from slime.megatron.checkpoint.files import find_checkpoint

    found = find_checkpoint(own.input_dir, step=args.ckpt_step)
    if found is None or found.kind == "hf":
        raise ValueError(f"--input-dir {own.input_dir}: no torch_dist checkpoint there; name a run's --save directory")
    torch_dist_to_hf(args, found, own.origin_hf_dir, own.output_dir)
    print(f"{found.path} -> {own.output_dir} ({time.monotonic() - start:.1f} s)")
