r"""Parse the tokens of one expression into a tree of arithmetic.

- Where it sits: `structure` splits an answer into expressions, this module reads each, and `numerics` compares two.
- Invariant: an expression with two usual readings (`1/2x`, `4\ 10/3`) is not read. It raises UnreadError, and the
  answer is compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.rollout.rewards.answers.tokens import Token, UnreadError, is_product
from slime.rollout.rewards.answers.trees import Node, Stream, bind, number
from slime.rollout.rewards.answers.vocabulary import words

MAX_TOKENS = 600

_ONE_ARGUMENT = frozenset(
    words("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot ln lg log exp det abs floor ceil")
)
_SEVERAL_ARGUMENTS = frozenset(words("max min gcd lcm"))
_INVERSE = {name: "arc" + name for name in ("sin", "cos", "tan", "cot")}
_CLOSING = {"(": ")", "[": "]", "{": "}", "{{": "}}"}
_FENCES = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
_MATRICES = frozenset({"pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix"})


class Parser(Stream):
    """A recursive descent parser: sum, product, sign, power, atom."""

    def __init__(self, tokens: Sequence[Token], functions: frozenset[str] | None = frozenset()) -> None:
        super().__init__(tokens)
        self.functions = functions
        self.bars = 0

    def whole(self) -> Node:
        if not self.tokens or len(self.tokens) > MAX_TOKENS:
            raise UnreadError("an expression without tokens, or with too many")
        node = self.chosen()
        if self.at < len(self.tokens):
            raise UnreadError(f"{self.tokens[self.at].text!r} does not continue the expression")
        return node

    def sum(self) -> Node:
        return self.nested(self._sum)

    def _sum(self) -> Node:
        node = self.product()
        while self.sees("+", "-", "pm", "mp"):
            operator = self.take().text
            right = self.product()
            if operator == "-":
                right = Node("neg", (right,))
            node = Node(operator, (node, right)) if operator in ("pm", "mp") else Node("+", (node, right))
        return node

    def product(self) -> Node:
        sign = ""
        while self.sees("+", "-", "pm", "mp"):
            found = self.take().text
            if found in ("pm", "mp") and sign:
                raise UnreadError("two signs")
            sign = found if found in ("pm", "mp") else sign if found == "+" else "" if sign == "-" else "-"
        node = self.factors()
        if sign == "-":
            return Node("neg", (node,))
        return Node(sign, (number(0), node)) if sign else node

    def factors(self) -> Node:
        node = self.power()
        divided = False
        while True:
            if self.sees("*", "times", "cdot"):
                self.at += 1
                node = Node("*", (node, self.signed()))
                divided = False
            elif self.sees("/", "div"):
                self.at += 1
                node = Node("/", (node, self.signed()))
                divided = True
            elif self.sees("bmod", "mod"):
                self.at += 1
                node = Node("mod", (node, self.signed()))
            elif self.begins_factor():
                if divided:
                    raise UnreadError("a/bc has two readings")
                following = self.peek()
                right = self.power()
                if following.kind == "number":
                    previous = self.tokens[self.at - 2]
                    if previous.kind == "number" or (not following.spaced and previous.kind == "command"):
                        raise UnreadError("two numbers with nothing in between")
                node = Node("*", (node, right))
            else:
                return node

    def signed(self) -> Node:
        if self.sees("-", "+"):
            return Node("neg", (self.signed(),)) if self.take().text == "-" else self.signed()
        return self.power()

    def begins_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "letter"):
            return True
        if token.kind == "open":
            return token.text in ("(", "[", "{{")
        if token.kind == "sign":
            return token.text == "|" and self.bars == 0
        starts = ("frac", "sqrt", "binom", "pi", "infty", "sum", "prod", "circ", "lfloor", "lceil", "e", "i")
        return token.kind == "command" and (
            token.text in starts
            or token.text in _ONE_ARGUMENT
            or token.text in _SEVERAL_ARGUMENTS
            or token.text.startswith("begin:")
        )

    def power(self) -> Node:
        base = self.atom()
        while True:
            if self.sees("!"):
                self.at += 1
                double = self.sees("!") and not self.peek().spaced
                self.at += double
                base = Node("factorial2" if double else "factorial", (base,))
            elif self.sees("%"):
                self.at += 1
                base = Node("/", (base, number(100)))
            elif self.sees("^"):
                self.at += 1
                if self.is_degree():
                    base = Node("*", (base, Node("degree")))
                    continue
                if self.peek().kind == "number" and len(self.peek().text) > 1:
                    raise UnreadError("`x^10` is x to the power 1, and 0, or x^{10}")
                exponent = self.argument()
                if self.sees("^"):
                    raise UnreadError("two exponents")
                base = Node("^", (base, exponent))
            elif self.sees("circ"):
                self.at += 1
                base = Node("*", (base, Node("degree")))
            else:
                return base

    def is_degree(self) -> bool:
        if self.sees("circ"):
            self.at += 1
            return True
        inside = [self.peek(ahead).text for ahead in range(3)]
        if inside == ["{{", "circ", "}}"]:
            self.at += 3
            return True
        return False

    def argument(self) -> Node:
        r"""Read what TeX takes as the argument of ^, \frac, \sqrt: a group, or one token (a number as a whole)."""
        if self.sees("{{"):
            return self.group()
        if self.sees("-"):
            self.at += 1
            return Node("neg", (self.argument(),))
        if self.sees("frac", "sqrt", "binom", "pi", "infty") or self.peek().kind in ("number", "letter"):
            return self.nested(self.atom)
        if self.sees("("):
            return self.group()
        raise UnreadError("an argument is missing")

    def group(self) -> Node:
        opening = self.take().text
        bars, self.bars = self.bars, 0
        node = self.chosen()
        self.bars = bars
        self.expect(_CLOSING[opening])
        return node

    def chosen(self) -> Node:
        r"""Read a sum, or `5 \choose 2`."""
        node = self.sum()
        if not self.sees("choose"):
            return node
        self.at += 1
        return Node("binom", (node, self.sum()))

    def atom(self) -> Node:
        token = self.peek()
        if token.kind == "number":
            return self.number()
        if token.kind == "letter":
            return self.symbol()
        if token.kind == "open" and token.text in ("(", "[", "{{"):
            return self.group()
        if self.sees("|"):
            return self.bars_around()
        if token.kind == "command":
            return self.command(self.take().text)
        raise UnreadError(f"{token.text!r} begins no expression")

    def bars_around(self) -> Node:
        self.at += 1
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect("|")
        return Node("abs", (node,))

    def number(self) -> Node:
        token = self.take()
        assert token.value is not None
        node = Node("number", value=token.value, decimals=token.decimals)
        if token.decimals >= 0 or not token.text.isdigit():
            return node
        return self.mixed(node) or node

    def fraction_argument(self) -> Node:
        if self.peek().kind == "number":
            token = self.first_digit()
            assert token.value is not None
            return Node("number", value=token.value)
        return self.argument()

    def subscript(self) -> str:
        """Return the name that follows an underscore, with the tokens' texts as they are."""
        self.at += 1
        if not self.sees("{{"):
            return self.take().text
        depth, parts = 0, list[str]()
        while self.at < len(self.tokens):
            token = self.take()
            depth += {"{{": 1, "}}": -1}.get(token.text, 0)
            if depth == 0:
                return "".join(parts)
            if token.text != "{{":
                parts.append(token.text)
        raise UnreadError("a subscript is never closed")

    def symbol(self) -> Node:
        name = self.take().text
        while self.sees("_"):
            name += "_" + self.subscript()
        while primes := self.primes():
            self.at += primes
            name += "'"
        if name in ("e", "i"):
            return Node(name)
        inverse = [token.text for token in self.tokens[self.at : self.at + 6]] == ["^", "{{", "-", "1", "}}", "("]
        if inverse and name in ("f", "g", "h"):
            self.at += 5
            name += "^{-1}"
        if self.sees("(") and (self.functions is None or name in self.functions):
            return Node("apply", self.several("("), name)
        return Node("symbol", name=name)

    def primes(self) -> int:
        r"""Return how many tokens the next prime takes: `'`, `^\prime` or `^{\prime}`; 0 if none follows."""
        texts = [self.peek(ahead).text for ahead in range(4)]
        if texts[0] in ("'", "prime"):
            return 1
        if texts[0] == "^" and texts[1] in ("'", "prime"):
            return 2
        return 4 if texts[:2] == ["^", "{{"] and texts[2:] in (["'", "}}"], ["prime", "}}"]) else 0

    def several(self, opening: str) -> tuple[Node, ...]:
        self.expect(opening)
        bars, self.bars = self.bars, 0
        arguments = [self.sum()]
        while self.sees(","):
            self.at += 1
            arguments.append(self.sum())
        self.bars = bars
        self.expect(_CLOSING[opening])
        return tuple(arguments)

    def command(self, name: str) -> Node:
        if name == "frac":
            if self.is_derivative():
                raise UnreadError("a derivative")
            above = self.fraction_argument()
            return Node("/", (above, self.fraction_argument()))
        if name == "binom":
            above = self.fraction_argument()
            return Node("binom", (above, self.fraction_argument()))
        if name == "sqrt":
            return self.root()
        if name in ("pi", "infty"):
            return Node("pi") if name == "pi" else Node("symbol", name=r"\infty")
        if name in _SEVERAL_ARGUMENTS:
            opening = self.peek().text
            if opening not in ("(", "{"):
                raise UnreadError("arguments are missing")
            return Node(name, self.several(opening))
        if name in ("sum", "prod"):
            return self.series(name)
        if name in _FENCES:
            closing, op = _FENCES[name]
            node = self.sum()
            self.expect(closing)
            return Node(op, (node,))
        if name in _ONE_ARGUMENT:
            return self.function(name)
        if name.startswith("begin:"):
            return self.matrix(name.removeprefix("begin:"))
        raise UnreadError(f"{name} is not read")

    def is_derivative(self) -> bool:
        r"""Return whether this is `\frac{dy}{dx}` or `\frac{d}{dx}`, whose letters are no factors."""
        start, groups = self.at, list[list[str]]()
        for _ in range(2):
            end = start
            while end < len(self.tokens) and self.tokens[end].text != "}}":
                end += 1
            groups.append([token.text for token in self.tokens[start : end + 1]])
            start = end + 1
        above, below = groups
        signs = ("d", r"\partial")
        return len(below) == 4 and below[0] == "{{" and below[1] in signs and above[:2] == ["{{", below[1]]

    def root(self) -> Node:
        degree = number(2)
        if self.sees("["):
            degree = self.group()
        return Node("root", (self.argument(), degree))

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        while self.sees("_", "^"):
            if self.take().text == "_":
                base = self.argument() if name == "log" else None
                if base is None:
                    raise UnreadError("a function with a subscript")
            else:
                exponent = self.argument()
        argument = self.function_argument()
        if exponent is not None and exponent == Node("neg", (number(1),)):
            if name not in _INVERSE:
                raise UnreadError("an inverse without a name")
            return Node(_INVERSE[name], (argument,))
        node = Node("logb", (argument, base)) if base is not None else Node(name, (argument,))
        return node if exponent is None else Node("^", (node, exponent))

    def function_argument(self) -> Node:
        r"""Read the group of `\sin(x)`, or the factors of `\sin 2x` up to an operator, function or parenthesis."""
        if self.sees("(", "[", "{{", "|"):
            return self.nested(self.atom)  # a power after it belongs to the function: `\sin(x)^2`
        negative = self.sees("-")
        self.at += negative
        node = self.nested(self.power)
        while self.begins_factor() and not self.sees("(", "[", "|"):
            if self.peek().kind == "command" and self.peek().text in _ONE_ARGUMENT | {"sum", "prod"}:
                break
            node = Node("*", (node, self.power()))
        return Node("neg", (node,)) if negative else node

    def series(self, name: str) -> Node:
        r"""Read \sum_{i=1}^{n} of the factors that follow."""
        bound, lower, upper = "", None, None
        while self.sees("_", "^"):
            if self.take().text == "^":
                upper = self.argument()
                continue
            self.expect("{{")
            bound = self.take().text
            self.expect("=")
            lower = self.sum()
            self.expect("}}")
        infinite = Node("symbol", name=r"\infty")
        if lower is None or upper is None or upper == infinite or not is_product(bound):
            raise UnreadError("a sum without its limits, or without end")
        body = self.nested(self.factors)
        return Node(name, (bind(body, bound), lower, upper), bound)

    def matrix(self, kind: str) -> Node:
        if kind not in _MATRICES:
            raise UnreadError(f"{kind} is no matrix")
        rows: list[Node] = []
        row: list[Node] = []
        while not self.sees(f"end:{kind}"):
            row.append(self.sum())
            if self.sees("&"):
                self.at += 1
            elif self.peek().kind == "row":
                self.at += 1
                rows.append(Node("row", tuple(row)))
                row = []
        self.at += 1
        rows += [Node("row", tuple(row))] if row else []
        if not rows or len({len(each.args) for each in rows}) != 1:
            raise UnreadError("rows of a matrix are not equally long")
        matrix = Node("matrix", tuple(rows))
        return Node("det", (matrix,)) if kind == "vmatrix" else matrix


def parse(tokens: Sequence[Token], functions: frozenset[str] | None = frozenset()) -> Node:
    """Return the tree of an expression; letters of `functions` (None: all letters) are applied to a parenthesis.

    Raises:
        UnreadError: the tokens are no expression that this parser reads, or have two usual readings.
    """
    return Parser(tokens, functions).whole()
