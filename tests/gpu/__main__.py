"""`python -m tests.gpu`: see tests/gpu/runner.py."""

from __future__ import annotations

import sys

from tests.gpu.runner import main

if __name__ == "__main__":  # a process that a check spawns imports this file too
    sys.exit(main(sys.argv[1:]))
