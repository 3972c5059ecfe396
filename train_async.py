"""Training with generation one rollout ahead: `slime train-async ...`, whose loop is in slime/cli/train_async.py."""

from __future__ import annotations

import sys

from slime.cli.train_async import main

if __name__ == "__main__":
    main(sys.argv[1:])
