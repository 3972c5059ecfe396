"""The tree of exceptions in `core.errors` is complete and names the right modules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from slime.core import errors

PACKAGE = Path(errors.__file__).parents[1]
BUILT_IN = {"Exception", "BaseException", "ValueError", "RuntimeError", "KeyError", "TypeError", "OSError"}


def tree_in_docstring(text: str) -> set[tuple[str, str, str]]:
    """Return (name, base, module) of each line; the depth of a name is the column at which it begins."""
    found: set[tuple[str, str, str]] = set()
    above: dict[int, str] = {}
    for line in text.splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+)(?: +\(([\w.]+)\))?  ", line + "  ")
        if match is None or (match[2] not in BUILT_IN and not match[1]):
            continue
        depth = len(match[1]) // 4
        above[depth] = match[2]
        if depth:
            found.add((match[2], above[depth - 1], match[3] or "core.errors"))
    return found


def tree_in_code() -> set[tuple[str, str, str]]:
    """Return (name, base, module) of every public exception of the package."""
    classes = {
        (node.name, base.id, ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    exceptions = set(BUILT_IN)
    while more := {name for name, base, _ in classes if base in exceptions} - exceptions:
        exceptions |= more
    return {row for row in classes if row[1] in exceptions}


def test_the_tree_of_errors_is_complete() -> None:
    assert tree_in_docstring(errors.__doc__ or "") == tree_in_code()
    assert ("Fault", "RunError", "core.errors") in tree_in_code()


def test_a_missing_or_misplaced_error_is_noticed() -> None:
    text = errors.__doc__ or ""
    assert tree_in_docstring(text.replace("(core.plugins)", "(core.hooks)")) != tree_in_code()
    assert tree_in_docstring(re.sub(r"\n.*HookError.*", "", text)) != tree_in_code()
    assert tree_in_docstring(text.replace("│   ├── Fault", "├── Fault    ")) != tree_in_code()
