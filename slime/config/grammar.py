"""The version of the ANTLR runtime that answers are compared with as mathematics.

- Used by: a rule before anything starts, and every reward worker when it starts, because its node may have another
  version.
- Invariant: every verdict comes from the version that the verdicts were tested with; without it there is no verdict.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "antlr4-python3-runtime"
TESTED = "4.13.2"
"""The tested version. The LaTeX grammar of latex2sympy2_extended has one generated parser for each of 4.9.3, 4.11.0 and
4.13.2. With another runtime it parses nothing, and every answer would count as wrong."""
REMEDY = f"pip install {PACKAGE}=={TESTED}"


def grammar_fault() -> str | None:
    """Return the fault of the installed ANTLR runtime, or None if it is the tested version."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed, but answers are compared as mathematics with version {TESTED}"
    if installed == TESTED:
        return None
    return f"{PACKAGE} {installed} is installed, but the comparison of answers was tested with {TESTED}"
