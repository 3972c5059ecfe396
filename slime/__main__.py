"""`python -m slime COMMAND ...`, the same as the command `slime`."""

from __future__ import annotations

from slime.cli.main import main

main()
