#!/usr/bin/env python3
"""Convert a torch_dist checkpoint to an HF directory: this program is `slime export`."""

from __future__ import annotations

import sys

from slime.cli.export import main
from slime.cli.main import run_command

if __name__ == "__main__":
    run_command("convert_torch_dist_to_hf.py", main, sys.argv[1:])
