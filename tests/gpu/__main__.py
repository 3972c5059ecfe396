"""`python -m tests.gpu`: see tests/gpu/runner.py."""

from __future__ import annotations

import sys

from tests.gpu.runner import main

sys.exit(main(sys.argv[1:]))
