#!/usr/bin/env python3
"""Convert an HF directory to a torch_dist checkpoint: this program is `slime convert`."""

from __future__ import annotations

import sys

from slime.cli.convert import main
from slime.cli.main import run_command

if __name__ == "__main__":
    run_command("convert_hf_to_torch_dist.py", main, sys.argv[1:])
