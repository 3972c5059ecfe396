"""The verdict on a response's code: it follows from what the code returns, and the code has no way to write it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from slime.core.code_tests import code_tests
from slime.sandbox.judging import judge, plain_lines
from slime.sandbox.run import Limits, Outcome, SandboxFault, refusal

pytestmark = pytest.mark.skipif(refusal("namespaces") is not None, reason="this kernel gives us no namespaces")
ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(2, 2) == 4  # expected-here"


def outcome(code: str, *tests: str | dict[str, str], limits: Limits | None = None, seconds: float = 30) -> str:
    found = code_tests(None, {"tests": list(tests)})
    return judge(code, found, kind="namespaces", limits=limits or Limits(), seconds=seconds).outcome.value


def test_asserts_find_right_and_wrong_code() -> None:
    assert outcome(ADD, TEST, "assert add('a', 'b') == 'ab'") == "right"
    assert outcome(ADD, TEST, "assert add(2, 3) == 4") == "wrong"
    assert outcome("def sub(a, b): return a - b", TEST) == "wrong"


VALUES = """
from collections import Counter, OrderedDict
from fractions import Fraction
def same(x): return x
def sort(x): x.sort()
def grow(x): x['k'] = [1]; x.pop('a')
def count(n): yield from range(n)
def letters(text): return Counter(text)
def half(): return Fraction(1, 2)
def fails(x): raise KeyError(x)
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item)
    def __len__(self): return len(self.items)
    def __getitem__(self, at): return self.items[at]
LIMIT = 7
"""


def test_values_and_objects_reach_the_tests() -> None:
    """Everything that tests usually do works: values of each kind, arguments that change, objects, exceptions."""
    values = (
        "for x in (None, True, 3, -2**70, 2**20000, 1.5, float('inf'), 2j, 'é\\ud800', b'a', bytearray(b'a'),"
        " [1, (2,)], {1: {2}}, frozenset({3}), range(3), {}, [], ()):\n  y = same(x)\n"
        "  assert y == x and type(y) is type(x), x"
    )
    changed = "x, y = [3, 1], {'a': 1}\nsort(x)\ngrow(y)\nassert x == [1, 3] and y == {'k': [1]}"
    objects = (
        "s = Stack(1)\ns.push((2, 3.5))\nassert len(s) == 2 and s[1] == (2, 3.5) and list(s) == [1, (2, 3.5)]\n"
        "assert s.items == [1, (2, 3.5)] and LIMIT == 7 and list(count(3)) == [0, 1, 2]\n"
        "assert letters('aab') == {'a': 2, 'b': 1}\nfrom fractions import Fraction\nassert half() == Fraction(1, 2)"
    )
    raises = "try:\n  fails('x')\nexcept KeyError:\n  pass\nelse:\n  assert False"
    checks = "def check(candidate):\n  assert candidate(4) == 4\ncheck(same)"
    assert outcome(VALUES, values, changed, objects, raises, checks) == "right"
    assert outcome(VALUES, "assert same(1) == 2 or same([1]) == [2]") == "wrong", "control"


FORGERIES = {
    "exits": ("import sys\nsys.exit(0)", "crash"),
    "ends at once": ("import os\nos._exit(0)", "crash"),
    "ends in the call": ("import os\ndef add(a, b): os._exit(0)", "crash"),
    "equals everything": ("class E:\n  __eq__ = lambda a, b: True\ndef add(a, b): return E()", "wrong"),
    "is an int that equals everything": (
        "class E(int):\n  __eq__ = lambda a, b: True\ndef add(a, b): return E(5)", "wrong"),
    "prints a result": ("print('{\"outcome\": \"right\"}')\ndef add(a, b): print('{\"outcome\": \"right\"}')", "wrong"),
    "writes to the channel": (
        "import json, os, struct\ntext = json.dumps({'outcome': 'right'}).encode()\n"
        "os.write(3, struct.pack('=I', len(text)) + text)\ndef add(a, b): return 5", "wrong"),
    "writes what is no message": ("import os\nos.write(3, b'\\xff' * 100)\ndef add(a, b): return 5", "crash"),
    "closes the channel": ("import os\ndef add(a, b): os.close(3)", "crash"),
    "changes built-ins": (
        "import builtins\nbuiltins.AssertionError = type(None)\nbuiltins.all = builtins.any = lambda *a: True\n"
        "def add(a, b): return 5", "wrong"),
    "defines built-ins": ("def abs(x): return 0\ndef add(a, b): return 5", "wrong"),
    "looks for the tests": (
        "import gc, sys\ndef add(a, b):\n  frame, seen = sys._getframe(), repr(gc.get_objects())\n  while frame:\n"
        "    seen += repr(frame.f_locals) + repr(frame.f_globals)\n    frame = frame.f_back\n"
        "  return 4 if 'expected' + chr(45) + 'here' in seen else 5", "wrong"),
    "reads files": (
        "import os\ndef add(a, b):\n  paths = [os.path.join(d, f) for d, _, fs in os.walk('/scratch') for f in fs]\n"
        "  seen = ''.join(open(path, errors='replace').read() for path in paths)\n"
        "  return 4 if 'expected' + chr(45) + 'here' in seen else 5", "wrong"),
    "raises the tests' exception": ("def add(a, b): raise AssertionError", "crash"),
    "asserts in its own name": ("class X:\n  def __bool__(self): return True\ndef add(a, b): return X()", "wrong"),
    "loops": ("def add(a, b):\n  while True: pass", "timeout"),
    "fills memory": ("def add(a, b): return ' ' * (1 << 40)", "memory"),
    "opens a socket": ("def add(a, b):\n  import socket\n  socket.socket()", "refused"),
    "fills the tests' output": ("def add(a, b): return '3' * (3 << 20)", "refused"),
    "returns too much": ("def add(a, b): return 'x' * (9 << 20)", "crash"),
    "returns deep lists": ("def add(a, b):\n  x = []\n  for _ in range(9**5): x = [x]\n  return x", "crash"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_code_cannot_write_its_verdict(name: str) -> None:
    code, expected = FORGERIES[name]
    tests = (TEST, "assert abs(add(1, 1) - 2) < 1e-9") if name == "defines built-ins" else (TEST,)
    tests = (f"print(add(2, 2))\n{TEST}",) if name == "fills the tests' output" else tests
    limits = Limits(cpu_seconds=1) if expected == "timeout" else None
    assert outcome(code, *tests, limits=limits) == expected


def test_a_forged_answer_needs_the_right_value() -> None:
    """Code may answer for itself: it is then judged by what it answers, as any code is. This is the control."""
    assert outcome("import os\ndef add(a, b): return {4: 4}[a + b]", TEST) == "right"


def test_output_is_compared_outside() -> None:
    code = "a, b = map(int, input().split())\nprint(a + b, '')\nprint()"
    assert outcome(code, {"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5", "stdout": "10"}) == "right"
    assert outcome(code, {"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5", "stdout": "11"}) == "wrong"
    assert outcome(code, {"stdin": "x", "stdout": "3"}) == "crash"
    assert outcome("print(3)\nexit(1)", {"stdout": "3"}) == "crash", "right output and an error is an error"
    assert outcome("print(3)\nexit(0)", {"stdout": "3"}) == "right"
    assert outcome("import time\nprint(3, flush=True)\ntime.sleep(60)", {"stdout": "3"}, seconds=2.5) == "timeout"
    assert plain_lines("a \r\n b\n\n") == ["a", " b"] != plain_lines("a\nb")


def test_all_tests_share_the_time() -> None:
    tests = code_tests(None, {"tests": [{"stdin": "", "stdout": ""}] * 3})
    judged = judge("", tests, kind="namespaces", limits=Limits(), seconds=0.5)
    assert (judged.outcome, judged.why) == (Outcome.TIMEOUT, "no time is left for test 1")
    with pytest.raises(ValueError, match="no tests"):
        judge("", [], kind="namespaces", limits=Limits(), seconds=5)


def test_unsendable_arguments_are_a_fault() -> None:
    """A function as an argument cannot reach the other process, which is no fault of the response's code."""
    with pytest.raises(SandboxFault, match="test 1: a test passes a function to the response's code"):
        outcome("def apply(f, x): return f(x)", "assert apply(lambda x: x, 1) == 1")


def test_the_same_code_gets_the_same_verdict() -> None:
    """Five kinds of code, with two runs at once; the order of a set does not change either."""
    code = "def first(): return next(iter({'a', 'b', 'c', 'd'}))\n" + ADD
    cases = [(code, "assert add(2, 2) == 4"), (code, "assert first() == 'a'"), ("import os; os._exit(0)", TEST),
             ("def add(a, b): return ' ' * (1 << 40)", TEST), ("import socket; socket.socket()", TEST)]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda case: outcome(*case), cases * 3))
    kinds = [set(found[place::5]) for place in range(5)]
    assert all(len(kind) == 1 for kind in kinds), kinds
    assert [kinds[0], *kinds[2:]] == [{"right"}, {"crash"}, {"memory"}, {"refused"}]
