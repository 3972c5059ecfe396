#!/usr/bin/env python3
"""Make the demo's task: `python3 examples/arithmetic/make_task.py ...` runs slime/cli/arithmetic/make_task.py."""

from __future__ import annotations

import sys

from slime.cli.arithmetic.make_task import main

if __name__ == "__main__":
    main(sys.argv[1:])
