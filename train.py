"""Synchronous training: `python3 train.py ...` is `slime train ...`, whose loop is in slime/cli/train.py."""

from __future__ import annotations

import sys

from slime.cli.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
