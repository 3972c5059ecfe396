#!/usr/bin/env python3
"""Show the answers of two models side by side: this program is `slime answers`."""

from __future__ import annotations

import sys

from slime.cli.answers import main
from slime.cli.main import run_command

if __name__ == "__main__":
    run_command("show_answers.py", main, sys.argv[1:])
