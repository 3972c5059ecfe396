"""Runs a server's module with an API key that stands on no command line, where every user of the machine reads it.

    SLIME_API_KEY=... python -m slime.engine.keyed MODULE FLAGS...

Path: `launch` starts engines and the router through this when a key is given. Invariant: the module sees
`--api-key KEY` behind its other flags, and its own children see no key in their environment.
"""

from __future__ import annotations

import os
import runpy
import sys

VARIABLE = "SLIME_API_KEY"


def main() -> None:
    module, flags = sys.argv[1], sys.argv[2:]
    sys.argv = [module, *flags, "--api-key", os.environ.pop(VARIABLE)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
