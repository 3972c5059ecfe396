"""Run a server's module with flags that are on no command line, where every user of the machine could read them.

    SLIME_SECRET_FLAGS='["--api-key=..."]' python -m slime.engine.keyed MODULE FLAGS...

- Called by: `launch` starts engines and the router through this module if they get a key or another secret.
- Invariant: the module sees the hidden flags after its other flags. Its children have none of them in their
  environment. Everything that Python prints in this process is masked.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import cast

from slime.core.masking import Masker, mask_output

VARIABLE = "SLIME_SECRET_FLAGS"


def main() -> None:
    module, flags = sys.argv[1], sys.argv[2:]
    hidden = cast(list[str], json.loads(os.environ.pop(VARIABLE)))
    sys.argv = [module, *flags, *hidden]
    mask_output(Masker(word.partition("=")[2] if word.startswith("--") else word for word in hidden))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
