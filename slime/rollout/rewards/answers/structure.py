r"""The structure of an answer: a value with its unit, words, a list, a set, a tuple, equations, a region.

- Where it sits: `tokens` comes before, and `comparison` compares two structures.
- Invariant: every token ends in exactly one part of the structure. Only introductions ("the answer is") and wrapping
  around a single value are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slime.rollout.rewards.answers.cutting import (
    SEPARATORS,
    SET_OPERATIONS,
    STRIPPED_SIGNS,
    closing,
    french,
    introduced,
    is_separator,
    joined,
    outside,
    qualifier,
    singular,
    split,
    unwrap,
    without_punctuation,
)
from slime.rollout.rewards.answers.expressions import parse
from slime.rollout.rewards.answers.tokens import Token, UnreadError
from slime.rollout.rewards.answers.trees import Node, number
from slime.rollout.rewards.answers.units import NO_UNIT, Unit, degree_ending, money_beginning, scale_of, unit_of
from slime.rollout.rewards.answers.vocabulary import ARTICLES, CAPITAL_WORDS, NUMBER_WORDS, pairs, words


@dataclass(frozen=True, slots=True)
class Value:
    """An expression, with its unit."""

    node: Node
    unit: Unit = NO_UNIT


@dataclass(frozen=True, slots=True)
class Words:
    """A text: words, and answers between them."""

    parts: tuple[str | Answer, ...]


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers. `kind`: bare (`1, 2`), set, tuple (with its brackets) or ratio."""

    kind: str
    items: tuple[Answer, ...]
    brackets: str = ""
    dots: int = -1
    """The index of the item that follows the dots."""
    connective: str = ""
    """`and` or `or`, if one of them connects the items of a bare list."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Sides with relations between them: `0<x<1`, `x=2`."""

    relations: tuple[str, ...]
    sides: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Sets or conditions together: cup, cap, setminus, or, and, builder (a variable, then its conditions)."""

    op: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """Mathematics that is not read: it equals only the same tokens."""

    text: str


Answer = Value | Words | Many | Chain | Region | Opaque

_RELATIONS = pairs(
    """
    = = < < > > le <= ge >= ne != in in notin notin approx = subset subset subseteq subseteq supset supset
    supseteq supseteq equiv equiv sim sim cong cong perp perp parallel parallel to to Rightarrow Rightarrow
    Leftrightarrow Leftrightarrow mapsto mapsto propto propto
    """
)
_CONNECTIVES = {"and": "and", "wedge": "and", "or": "or", "vee": "or"}
_SYSTEMS = frozenset(words("cases aligned align array gathered split rcases dcases gather"))


@dataclass
class Reader:
    """Reads answers; remembers which letters were applied to a parenthesis and which were not."""

    functions: frozenset[str] | None = None
    applied: set[str] = field(default_factory=set[str])
    alone: set[str] = field(default_factory=set[str])

    def read(self, tokens: Sequence[Token]) -> Answer:
        tokens = introduced(unwrap(list(tokens)))
        if not tokens:
            raise UnreadError("nothing")
        tokens = french(qualifier(tokens))
        system = self._system(tokens)
        if system is not None:
            return system
        parts, connectives = split(tokens, is_separator)
        parts = [part for part in parts if part]
        if len(parts) == 1:
            return self._one(parts[0])
        if not parts:
            raise UnreadError("nothing")
        items = [self._one(part) for part in parts]
        words = {token.text.lower() for token in connectives}
        if any(_conditions(item) for item in items) and words <= {"or", "vee"}:
            return Region("or", tuple(items))
        if words == {"or"} and all(isinstance(item, Many) and set(item.brackets) & {"[", "]"} for item in items):
            return Region("cup", tuple(items))
        if all(_conditions(item) for item in items) and words <= {"and", "wedge"}:
            return Region("and", tuple(items))
        ends = {_CONNECTIVES[word] for word in words & _CONNECTIVES.keys()}
        return replace(_many("bare", items), connective=ends.pop() if len(ends) == 1 else "")

    def _system(self, tokens: list[Token]) -> Answer | None:
        r"""Return the rows of a `cases` environment, or of `\left\{ ... \right.`; None if the tokens are neither."""
        first, last = tokens[0], tokens[-1]
        if first.kind == "open" and first.text == "{" and not any(token.text == "}" for token in tokens):
            return self.read(tokens[1:])
        name = first.text.removeprefix("begin:")
        if first.text == name or name not in _SYSTEMS or last.text != f"end:{name}":
            return None
        inner = [replace(token, kind="row") if token.text == ";" else token for token in tokens[1:-1]]
        rows, _ = split(inner, lambda token: token.kind == "row")
        read: list[Answer] = []
        for row in rows:
            cells = [cell for cell in split(row, lambda token: token.text == "&")[0] if cell]
            if not cells:
                continue
            joined = name in ("cases", "rcases", "dcases", "array") and len(cells) == 2 and not _continues(cells)
            if joined:  # a value and its condition
                read.append(Many("tuple", tuple(self.read(cell) for cell in cells), "if"))
            else:
                read.append(self.read([token for cell in cells for token in cell]))
        return read[0] if len(read) == 1 else _many("bare", read)

    def _one(self, tokens: list[Token]) -> Answer:
        tokens = unwrap(tokens)
        if not tokens:
            raise UnreadError("nothing between separators")
        sides, relations = split(tokens, lambda token: token.kind in ("sign", "command") and token.text in _RELATIONS)
        if relations:
            if relations[0].text in STRIPPED_SIGNS and not sides[0]:
                return self._one(tokens[1:])
            names = tuple(_RELATIONS[token.text] for token in relations)
            return Chain(names, tuple(self._open_side(side) for side in sides))
        for operation in SET_OPERATIONS:
            parts, found = split(tokens, lambda token, op=operation: token.kind == "command" and token.text == op)
            if found:
                return Region(operation, tuple(self._one(part) for part in parts))
        if tokens[0].kind == "open" and closing(tokens, 0) == len(tokens) - 1:
            return self._brackets(tokens)
        if all(token.kind != "word" for token in tokens):
            parts, found = split(tokens, lambda token: token.text == ":")
            if found:
                return Many("ratio", tuple(self._one(part) for part in parts))
        return self._text(tokens)

    def _open_side(self, tokens: list[Token]) -> Answer:
        if not tokens:
            return Words(())  # `\le 5`
        return self.read(tokens)

    def _brackets(self, tokens: list[Token]) -> Answer:
        opening, inner, ending = tokens[0].text, tokens[1:-1], tokens[-1].text
        if opening == "{":
            return self._set(inner)
        items = [part for part in split(inner, lambda token: token.text in SEPARATORS)[0] if part]
        if opening == "(" and len(items) < 2 and ending != ")":
            raise UnreadError("brackets of two kinds around one item")
        if len(items) < 2:
            return self.read(inner) if opening == "(" else Many("tuple", (self.read(inner),), opening + ending)
        return _many("tuple", [self._one(item) for item in items], opening + ending)

    def _set(self, inner: list[Token]) -> Answer:
        if not inner:
            return Many("set", ())
        bars = [index for index, token in enumerate(inner) if token.text in ("|", "mid", ":") and outside(inner, index)]
        if len(bars) == 1:
            return Region("builder", (self._one(inner[: bars[0]]), self.read(inner[bars[0] + 1 :])))
        inside = self.read(inner)
        if isinstance(inside, Many) and inside.kind == "bare":
            return replace(inside, kind="set")
        return Many("set", (inside,))

    def _text(self, tokens: list[Token]) -> Answer:
        """Read a value with a unit, or words with answers between them."""
        if len(tokens) == 1 and tokens[0].kind == "command" and tokens[0].text == "emptyset":
            return Many("set", ())
        whole = tokens
        tokens, money = money_beginning(tokens)
        words = [index for index, token in enumerate(tokens) if token.kind == "word"]
        if not words:
            return self._value(tokens, money)
        if words[0] > 0 and money == NO_UNIT:
            scale, rest = scale_of(tokens[words[0] :])
            unit = unit_of(rest)
            if unit is not None:
                value = self._value(tokens[: words[0]], unit)
                if isinstance(value, Value) and scale is not None:
                    return replace(value, node=Node("*", (value.node, number(scale))))
                if isinstance(value, Value):
                    return value
        return self._words(whole)

    def _value(self, tokens: list[Token], unit: Unit) -> Answer:
        if any(token.text == "ldots" for token in tokens):
            return Opaque(joined(tokens))
        tokens, ending = degree_ending(tokens)
        if unit == NO_UNIT:
            unit = ending
        elif ending != NO_UNIT:
            unit = replace(unit, name=f"{ending.name} {unit.name}")
        try:
            node = parse(tokens, self.functions)
        except UnreadError:
            return Opaque(joined(tokens))
        self._remember(node)
        return Value(node, unit)

    def _remember(self, node: Node) -> None:
        if node.op in ("apply", "symbol"):
            (self.applied if node.op == "apply" else self.alone).add(node.name)
        for arg in node.args:
            self._remember(arg)

    def _words(self, tokens: list[Token]) -> Answer:
        parts: list[str | Answer] = []
        rest: list[Token] = []
        single = len(tokens) == 1 and len(tokens[0].text) == 1
        for token in [*tokens, Token("word", "")]:
            if token.kind != "word":
                rest.append(token)
                continue
            rest = without_punctuation(rest)
            if rest:
                parts.append(self._one(rest))
                rest = []
            word = token.text if len(token.text) == 1 else token.text.lower().replace("'", "")
            if word and word not in ARTICLES:
                parts += map(singular, word.split("-"))
        row = len(tokens) == 1 and tokens[0].text.isupper() and tokens[0].text not in CAPITAL_WORDS
        if (single and tokens[0].text.isascii()) or row:
            return Value(Node("symbol", name=tokens[0].text))
        if len(parts) == 1 and isinstance(parts[0], str) and parts[0] in NUMBER_WORDS:
            return Value(number(NUMBER_WORDS[parts[0]]))
        if len(parts) == 1 and not isinstance(parts[0], str):
            return parts[0]
        return Words(tuple(parts))


def _many(kind: str, items: Sequence[Answer], brackets: str = "") -> Answer:
    kept: list[Answer] = []
    dots = -1
    for item in items:
        if isinstance(item, Opaque) and item.text == "ldots":
            if dots >= 0:
                raise UnreadError("dots twice")
            dots = len(kept)
        else:
            kept.append(item)
    return Many(kind, tuple(kept), brackets, dots)


def _conditions(item: Answer) -> bool:
    """Return whether it is an inequality, or inequalities together."""
    if isinstance(item, Region):
        return item.op in ("or", "and")
    return isinstance(item, Chain) and any(relation not in ("=", "to", "Rightarrow") for relation in item.relations)


def _continues(cells: list[list[Token]]) -> bool:
    """Return whether the second cell continues the first: `x &= 1`."""
    return bool(cells[1]) and cells[1][0].text in _RELATIONS
