"""The version of the ANTLR runtime with which answers are compared as mathematics.

Path: a rule asks before anything starts, and every reward worker when it starts, for its node may have another one.
Invariant: a verdict comes from the version that the verdicts were tested with, or there is none.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "antlr4-python3-runtime"
TESTED = "4.13.2"
"""The LaTeX grammar of latex2sympy2_extended has one generated parser for each of 4.9.3, 4.11.0 and 4.13.2. With a
runtime that does not fit, it parses nothing, and what it is asked for reads as wrong."""
REMEDY = f"pip install {PACKAGE}=={TESTED}"


def grammar_fault() -> str | None:
    """The fault of the installed ANTLR runtime; None where it is the tested one."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed, and answers are compared as mathematics with {TESTED}"
    if installed == TESTED:
        return None
    return f"{PACKAGE} {installed} is installed, and verdicts on answers were tested with {TESTED}"
