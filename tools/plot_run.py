#!/usr/bin/env python3
"""Draw the curves of a run: this program is `slime plot`."""

from __future__ import annotations

import sys

from slime.cli.main import run_command
from slime.cli.plot import main

if __name__ == "__main__":
    run_command("plot_run.py", main, sys.argv[1:])
