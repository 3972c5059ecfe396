"""The tests of a row for code: which are accepted, and which are refused because no response could fail them."""

from __future__ import annotations

import json

import pytest

from slime.core.code_tests import Assert, Streams, code_tests

ADD = "assert add(2, 2) == 4"
FORM = r"a list of Python asserts, or of \{\"stdin\": TEXT, \"stdout\": TEXT\}"


def test_tests_are_in_metadata_or_in_the_label() -> None:
    runs = [{"stdin": "1", "stdout": "2"}, {"stdout": "3"}]
    assert code_tests(ADD, {}) == [Assert(ADD, ("add",))]
    assert code_tests(json.dumps(runs), {}) == [Streams("1", "2"), Streams("", "3")]
    assert code_tests(ADD, {"tests": [*runs, ADD]}) == [Streams("1", "2"), Streams("", "3"), Assert(ADD, ("add",))]
    assert code_tests(None, {"tests": json.dumps([ADD, ADD])}) == [Assert(ADD, ("add",))] * 2
    assert code_tests(None, {"tests": runs[1]}) == [Streams("", "3")]


def test_names_are_those_that_the_response_defines() -> None:
    source = (
        "import math as m\nfrom os import path\ndef check(candidate, *, least=0):\n  for x in (1, 2):\n"
        "    assert candidate(x) > least and [y for y in helper(x)] and m.inf and path and abs(x)\n"
        "try:\n  check(solve)\nexcept ValueError as error:\n  print(error)\nclass A: pass\nA()"
    )
    [test] = code_tests(source, {})
    assert isinstance(test, Assert) and test.names == ("helper", "solve")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (None, f"there are no tests: neither metadata.tests nor the label is {FORM}"),
        ("", "there are no tests"),
        ([], "there are no tests"),
        (7, "there are no tests"),
        (["assert f(", ADD], "test 1 is not Python: '\\(' was never closed"),
        ([ADD, "f(2) == 4"], "test 2 has no assert: 'f\\(2\\) == 4'"),
        (["assert (f(2) == 4, 'no')"], "test 1 asserts something that is always true"),
        (["assert 'f(2) == 4'"], "test 1 asserts something that is always true"),
        (["assert sum([1, 2]) == 3"], "test 1 uses nothing that the response defines"),
        (["def f(x): return x\nassert f(1) == 1"], "test 1 uses nothing that the response defines"),
        (["return f(1)\nassert f(1)"], "test 1 is not Python: 'return' outside function"),
        (["assert f(1) == '\0'"], "test 1 is not Python"),
        ([{"stdin": "1"}], f"test 1 is .*; tests are {FORM}"),
        ([{"stdin": "1", "stdout": 2}], "test 1 is "),
        ([{"stdin": "1", "stdout": "2", "input": "3"}], "test 1 is "),
        ([None], "test 1 is 'None'"),
    ],
)
def test_bad_tests_are_refused(given: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        code_tests(None, {} if given is None else {"tests": given})
