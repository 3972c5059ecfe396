"""The tests of a data row for `--rm-type code`: asserts that call the response's code, or runs of it as a program.

- Used by: `config.reward_types` checks every row before anything starts, and `sandbox.judging` judges by them.
- Invariant: a test that no response can fail is an error and not a test: an assert of something that is always true, or
  statements that use nothing of the response.
"""

from __future__ import annotations

import ast
import builtins
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

TESTS_KEY = "tests"
"""The key of the tests in a row's metadata, which go before the label."""
_FORM = 'a list of Python asserts, or of {"stdin": TEXT, "stdout": TEXT}'


@dataclass(frozen=True)
class Assert:
    """Python statements with asserts; `names` are those that the response has to define, in alphabetical order."""

    source: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Streams:
    """A run of the code as a program: its standard input, and the output that is right."""

    stdin: str
    stdout: str


def code_tests(label: str | None, metadata: Mapping[str, Any]) -> list[Assert | Streams]:
    """Return the tests of a row: metadata.tests if given, otherwise its label, a list or the JSON text of one.

    A text that is no JSON list is one assert.

    >>> code_tests("assert add(2, 2) == 4", {})
    [Assert(source='assert add(2, 2) == 4', names=('add',))]
    >>> code_tests('[{"stdin": "2 2", "stdout": "4"}]', {})
    [Streams(stdin='2 2', stdout='4')]

    Raises:
        ValueError: there are none, or one of them is no test.
    """
    given: Any = metadata.get(TESTS_KEY, label)
    if isinstance(given, str):
        given = _read_json(given)
    tests: list[Any] = [given] if isinstance(given, dict) else cast(list[Any], given) if isinstance(given, list) else []
    if not tests:
        raise ValueError(f"there are no tests: neither metadata.{TESTS_KEY} nor the label is {_FORM}")
    found: list[Assert | Streams] = []
    for number, test in enumerate(tests, start=1):
        try:
            found.append(_assert(test) if isinstance(test, str) else _streams(test))
        except ValueError as error:
            raise ValueError(f"test {number} {error}") from error
    return found


def _read_json(text: str) -> Any:
    """Return the list or dict that a JSON text holds; otherwise the text is one test, or none if it is empty."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list | dict):
        return cast(Any, value)
    return [text] if text.strip() else []


def _streams(test: Any) -> Streams:
    if isinstance(test, dict):
        entries = cast(dict[str, Any], test)
        stdin, stdout = entries.get("stdin", ""), entries.get("stdout")
        if isinstance(stdin, str) and isinstance(stdout, str) and entries.keys() <= {"stdin", "stdout"}:
            return Streams(stdin, stdout)
    raise ValueError(f"is {str(cast(object, test))[:80]!r}; tests are {_FORM}")


def _assert(source: str) -> Assert:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as `assert (x, "message")`, which is an error below
            tree = ast.parse(source)
            compile(tree, "test", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is not Python: {error}") from error
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    if not asserts:
        raise ValueError(f"has no assert: {source[:80]!r}")
    for node in asserts:
        always = isinstance(node.test, ast.Tuple) and bool(node.test.elts)
        if always or (isinstance(node.test, ast.Constant) and bool(node.test.value)):
            raise ValueError(f"asserts something that is always true: {ast.unparse(node)[:80]!r}")
    names = sorted(_read(tree) - _bound(tree) - vars(builtins).keys())
    if not names:
        raise ValueError(f"uses nothing that the response defines (built-in names are Python's own): {source[:80]!r}")
    return Assert(source, tuple(names))


def _read(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    """Return the names that the statements define themselves, in any scope."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.arg():
                found.add(node.arg)
            case ast.alias():
                found.add((node.asname or node.name).partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                found.add(name)
            case _:
                continue
    return found
