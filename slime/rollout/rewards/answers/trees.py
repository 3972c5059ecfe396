"""The tree of an expression, and the stream of tokens that it is read from.

- Used by: `expressions` makes trees with these; `numerics` and `equality` read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from slime.rollout.rewards.answers.tokens import Token, UnreadError

MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class Node:
    """`op` applied to `args`. Leaves: `number` has a value, `symbol` a name."""

    op: str
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)
    decimals: int = -1

    def names(self) -> frozenset[str]:
        """Return the names of the symbols in it, without the bound ones of sums."""
        if self.op == "symbol":
            return frozenset({self.name})
        inner = frozenset().union(*(arg.names() for arg in self.args)) if self.args else frozenset[str]()
        return inner - {self.name} if self.op in ("sum", "prod") else inner

    def has(self, *ops: str) -> bool:
        return self.op in ops or any(arg.has(*ops) for arg in self.args)


def number(value: Fraction | int) -> Node:
    return Node("number", value=Fraction(value))


def bind(node: Node, name: str) -> Node:
    """Return the body of a sum over `i` or `e`, in which the letter is an index and no constant."""
    if node == Node(name):
        return Node("symbol", name=name)
    args = tuple(bind(arg, name) for arg in node.args)
    return Node(node.op, args, node.name, node.value, node.decimals)


class Stream:
    """Tokens, and the position of the next one."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else Token("end", "")

    def take(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def sees(self, *texts: str, kinds: tuple[str, ...] = ("sign", "command", "open", "close")) -> bool:
        token = self.peek()
        return token.kind in kinds and token.text in texts

    def expect(self, text: str) -> None:
        if not self.sees(text):
            raise UnreadError(f"{text!r} is missing")
        self.at += 1

    def nested(self, read: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadError("too deep")
        node = read()
        self.depth -= 1
        return node

    def mixed(self, whole: Node) -> Node | None:
        r"""Read `1\frac12` or `1 1/2`: a whole number and a proper fraction; None if something else follows."""
        start = self.at
        if self.sees("frac"):
            self.at += 1
            above, below = self.digit_argument(), self.digit_argument()
        elif self.peek().kind == "number" and self.peek().spaced and self.peek(1).text == "/":
            above, below = self.take(), (self.take(), self.take())[1]
        else:
            return None
        if above is None or below is None or above.kind != "number" or below.kind != "number":
            self.at = start
            return None
        assert above.value is not None and below.value is not None
        if not above.text.isdigit() or not below.text.isdigit() or not 0 < above.value < below.value:
            raise UnreadError("a whole number and a fraction that is not proper")
        return number(whole.value + above.value / below.value)

    def digit_argument(self) -> Token | None:
        r"""Read the number that \frac takes here: in braces, or the next digit; the rest of its digits are kept."""
        if self.sees("{{"):
            found = self.peek(1)
            if found.kind != "number" or self.peek(2).text != "}}":
                return None
            self.at += 3
            return found
        if self.peek().kind != "number":
            return None
        return self.first_digit()

    def first_digit(self) -> Token:
        r"""Read the first digit of a number of several digits, as in TeX's \frac12; the others are kept for later."""
        token = self.take()
        if len(token.text) == 1 or not token.text.isdigit():
            return token
        rest = Token("number", token.text[1:], Fraction(token.text[1:]))
        self.tokens = [*self.tokens[: self.at], rest, *self.tokens[self.at :]]
        return Token("number", token.text[0], Fraction(token.text[0]))
