"""Every test that docs/security.md names for one of its claims exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
SECURITY = TESTS.parent / "docs" / "security.md"


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return (file under tests/, function) of every row of the last table."""
    rows = text.partition("## Tests of these claims")[2].splitlines()
    found = [re.fullmatch(r"\| .+ \| `([\w/]+\.py)::(test_\w+)` \|", row) for row in rows if row.startswith("| ")][2:]
    assert all(found), "each row names one test"
    return [(match[1], match[2]) for match in found if match]


def test_every_claim_names_a_test_that_exists() -> None:
    named = named_tests(SECURITY.read_text(encoding="utf-8"))
    assert len(named) >= 17
    for path, function in named:
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in there, f"{path}::{function}"
