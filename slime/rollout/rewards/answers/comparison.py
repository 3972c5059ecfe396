r"""Equality of two answers, by their structure.

- Called by: `slime.rollout.rewards.mathematics` calls `equal_answers`. `structure` reads both answers; `regions` and
  `equality` decide about their parts.
- Invariant: the relation is symmetric. If neither answer is read as mathematics, only the same text is equal. Nothing
  is evaluated as code, and no input raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slime.rollout.rewards.answers import library, regions
from slime.rollout.rewards.answers.characters import one_spelling
from slime.rollout.rewards.answers.cutting import joined
from slime.rollout.rewards.answers.equality import equal_trees, proportional
from slime.rollout.rewards.answers.lists import progression
from slime.rollout.rewards.answers.parts import agree_on_qualifiers, bare, names_in, units_of
from slime.rollout.rewards.answers.structure import Answer, Chain, Many, Opaque, Reader, Region, Value, Words
from slime.rollout.rewards.answers.tokens import UnreadError, tokenise
from slime.rollout.rewards.answers.trees import Node, number
from slime.rollout.rewards.answers.units import NO_UNIT, PERCENT, may_be_left_out
from slime.rollout.rewards.answers.vocabulary import OTHER_WORDS

MAX_ITEMS = 60
"""The most items of a list in any order, because each may be compared with each."""


def equal_answers(answer: str, label: str) -> bool:
    r"""Return whether two answers mean the same.

    Args:
        answer: the model's answer, plain or LaTeX.
        label: the answer that it is compared with. The order of the two does not matter.
    """
    ours, theirs = one_spelling(answer), one_spelling(label)
    if not ours or not theirs:
        return False
    if ours == theirs:
        return True
    try:
        if joined(tokenise(ours)) == joined(tokenise(theirs)):
            return True
        one, other = read_both(ours, theirs)
        if not agree_on_qualifiers(one, other):
            return False
        one, other = bare(one, other)
        if same(one, other):
            return True
        for text, each, value in ((ours, one, other), (theirs, other, one)):
            if isinstance(each, Opaque) and isinstance(value, Value) and library.may_read(text):
                return value.unit == NO_UNIT and library.equal_to_series(text, value.node)
        if bool(units_of(one)) == bool(units_of(other)):
            return False
        # `5 m` is five times m, unless the other answer has a unit.
        one, other = read_both(ours, theirs, letters_are_units=True)
        return bool(units_of(one)) and bool(units_of(other)) and same(*bare(one, other))
    except (UnreadError, RecursionError):
        return False


def read_both(ours: str, theirs: str, letters_are_units: bool = False) -> tuple[Answer, Answer]:
    """Read both answers with the same set of letters as functions: those that never appear without a parenthesis."""
    tokens = tokenise(ours, letters_are_units), tokenise(theirs, letters_are_units)
    reader = Reader()
    one, other = reader.read(tokens[0]), reader.read(tokens[1])
    if reader.applied & reader.alone:
        reader = Reader(frozenset(reader.applied - reader.alone))
        one, other = reader.read(tokens[0]), reader.read(tokens[1])
    return one, other


def same(one: Answer, other: Answer) -> bool:
    """Return whether two structures mean the same; the order does not matter."""
    one, other = plain(one), plain(other)
    if one == other:
        return True
    if regions.is_region(one) or regions.is_region(other):
        return _same_region(one, other)
    if isinstance(one, Chain) and isinstance(other, Chain):
        return _same_chains(one, other)
    ours, theirs = named(one), named(other)
    if ours is not None and theirs is not None:
        return ours.name == theirs.name and same(ours.general, theirs.general)
    if ours is not None and same(ours.value, other):
        return True
    if theirs is not None and same(one, theirs.value):
        return True
    if isinstance(one, Chain) or isinstance(other, Chain):
        chain, rest = (one, other) if isinstance(one, Chain) else (other, one)
        assert isinstance(chain, Chain)
        spread = _spread(chain)
        if chain.relations == ("in",):
            return same(chain.sides[1], rest)
        return spread is not None and isinstance(rest, Many) and _same_many(spread, rest)
    if isinstance(one, Many) and isinstance(other, Many):
        return _same_many(one, other)
    if isinstance(one, Value) and isinstance(other, Value):
        return _same_values(one, other)
    return _same_words(one, other)


def plain(answer: Answer) -> Answer:
    """Replace a plus-minus sign by two values, and make a list in a list part of the outer one."""
    if isinstance(answer, Value) and answer.node.has("pm", "mp"):
        return Many("bare", tuple(replace(answer, node=_signed(answer.node, plus)) for plus in (True, False)))
    if isinstance(answer, Many) and answer.kind in ("bare", "set") and answer.dots < 0:
        items: list[Answer] = []
        for item in map(plain, answer.items):
            items += item.items if isinstance(item, Many) and item.kind == "bare" and item.dots < 0 else [item]
        return replace(answer, items=tuple(items))
    if isinstance(answer, Chain) and answer.relations == ("=",):
        right = plain(answer.sides[1])
        return replace(answer, sides=(answer.sides[0], right))
    return answer


def _signed(node: Node, plus: bool) -> Node:
    args = tuple(_signed(arg, plus) for arg in node.args)
    if node.op in ("pm", "mp"):
        right = args[1] if plus == (node.op == "pm") else Node("neg", (args[1],))
        return right if args[0] == number(0) else Node("+", (args[0], right))
    return replace(node, args=args)


def _same_region(one: Answer, other: Answer) -> bool:
    ours, theirs = units_of(one), units_of(other)
    if ours and theirs and ours != theirs:
        return False
    if isinstance(one, Many) and isinstance(other, Many) and one.brackets == other.brackets and _same_many(one, other):
        return True
    verdict = regions.same_region(one, other)
    if verdict is not None:
        return verdict
    if isinstance(one, Chain) and isinstance(other, Chain):
        return _same_chains(one, other)
    if isinstance(one, Region) and isinstance(other, Region) and one.op == other.op:
        if one.op in ("setminus", "builder"):
            return len(one.parts) == len(other.parts) and all(map(same, one.parts, other.parts))
        return _matched(one.parts, other.parts)
    return False


def name_of(side: Answer) -> tuple[object, ...] | None:
    """Return what names a value before an equals sign: a letter, a function of letters, words, a tuple of names."""
    if isinstance(side, Value) and side.unit == NO_UNIT:
        if side.node.op == "symbol":
            return (side.node.name,)
        if side.node.op == "apply":
            return (side.node.name, "()", len(side.node.args))
    if isinstance(side, Words):
        return None if OTHER_WORDS & {part for part in side.parts if isinstance(part, str)} else side.parts
    if isinstance(side, Many) and side.kind == "tuple":
        names = tuple(name_of(item) for item in side.items)
        return None if None in names else names
    return None


@dataclass(frozen=True, slots=True)
class Named:
    """A value that an equation gives to a name."""

    name: tuple[object, ...]
    """The names; empty if every side is a value, as in `2+3=5`."""
    value: Answer
    general: Answer
    """The value, with a function's arguments numbered by place, so that `f(x)=x` and `f(n)=n` are the same."""


def named(answer: Answer) -> Named | None:
    """Read `x = 5`, `x = 2+3 = 5` or `x = 1, 2`; None if there is no single name, or the sides contradict."""
    if isinstance(answer, Many) and answer.kind == "bare":
        return _named_list(answer)
    if not isinstance(answer, Chain) or any(relation != "=" for relation in answer.relations):
        return None
    sides = [(name_of(side), side) for side in answer.sides]
    values = [side for name, side in sides if not name]
    names = [(name, side) for name, side in sides if name]
    if not values and len(sides) == 2:  # `f(x) = x`, `x = a`: the left is the name
        values, names = [sides[1][1]], names[:1]
    if not values or len(names) > 1 or not all(same(values[-1], value) for value in values[:-1]):
        return None
    value = values[-1]
    if not names:
        return Named((), value, value)
    name, side = names[0]
    if isinstance(side, Value) and side.node.op == "apply":
        general = value
        for index, argument in enumerate(side.node.args):
            if isinstance(general, Value) and argument.op == "symbol" and argument.name in names_in(value):
                general = replace(general, node=_renamed(general.node, argument.name, f"argument {index}"))
            else:
                name = (*name, argument)
        return Named(name, value, general)
    return None if {*name} & names_in(value) else Named(name, value, value)


def _named_list(answer: Many) -> Named | None:
    if not answer.items or not isinstance(answer.items[0], Chain):
        return None
    first = named(answer.items[0])
    if first is None or not first.name:
        return None
    values = [first.value]
    for item in answer.items[1:]:
        found = named(item) if isinstance(item, Chain) else Named(first.name, item, item)
        if found is None or found.name != first.name:
            return None
        values.append(found.value)
    together = replace(answer, items=tuple(values))
    return Named(first.name, together, together)


def _renamed(node: Node, old: str, new: str) -> Node:
    if node.op == "symbol" and node.name == old:
        return replace(node, name=new)
    return replace(node, args=tuple(_renamed(arg, old, new) for arg in node.args))


def _spread(chain: Chain) -> Many | None:
    """Turn `(x,y)=(1,2)` into `x=1, y=2`."""
    left, right = chain.sides[0], chain.sides[-1]
    if chain.relations != ("=",) or not isinstance(left, Many) or not isinstance(right, Many):
        return None
    if len(left.items) != len(right.items) or left.brackets != "()" or right.brackets != "()":
        return None
    return Many("bare", tuple(Chain(("=",), pair) for pair in zip(left.items, right.items, strict=True)))


def _solution(system: Many) -> Many | None:
    """Turn `x=1, y=2` into `(1,2)`: the values of different letters, in the order of the alphabet."""
    found = [named(item) if isinstance(item, Chain) else None for item in system.items]
    names = [each.name for each in found if each is not None and len(each.name) == 1]
    if len(found) < 2 or len(names) != len(found) or names != sorted(set(names), key=str):
        return None
    return Many("tuple", tuple(each.value for each in found if each is not None), "()")


def _same_chains(one: Chain, other: Chain) -> bool:
    ours, theirs = named(one), named(other)
    if ours is not None and theirs is not None and ours.name == theirs.name and same(ours.general, theirs.general):
        return True
    one, other = _turned(one), _turned(other)
    if one.relations == other.relations and all(map(same, one.sides, other.sides)):
        return True
    if {*one.relations, *other.relations} == {"="} and len(one.sides) == len(other.sides) and len(one.sides) > 2:
        return _matched(one.sides, other.sides)
    spread = _spread(one), _spread(other)
    if spread[0] is not None and spread[1] is not None:
        return _same_many(spread[0], spread[1])
    if one.relations != other.relations or len(one.relations) != 1 or one.relations[0] not in ("=", "<", "<=", "!="):
        return False
    sides = [*one.sides, *other.sides]
    if not all(isinstance(side, Value) and side.unit == NO_UNIT for side in sides):
        return False
    a, b, c, d = (side.node for side in sides if isinstance(side, Value))
    ordered = one.relations[0] in ("<", "<=")
    return proportional(Node("+", (a, Node("neg", (b,)))), Node("+", (c, Node("neg", (d,)))), positive=ordered)


def _turned(chain: Chain) -> Chain:
    """Turn relations from left to right: `b > a` becomes `a < b`."""
    turned = {">": "<", ">=": "<=", "supset": "subset", "supseteq": "subseteq"}
    if not all(relation in turned for relation in chain.relations):
        return chain
    return Chain(tuple(turned[relation] for relation in reversed(chain.relations)), chain.sides[::-1])


def _same_many(one: Many, other: Many) -> bool:
    kinds = {one.kind, other.kind}
    if kinds == {"bare", "tuple"}:
        system, point = (one, other) if one.kind == "bare" else (other, one)
        solved = _solution(system)
        return solved is not None and point.brackets == "()" and _same_many(solved, point)
    if kinds == {"ratio"}:
        return _same_ratios(one, other)
    if one.dots >= 0 or other.dots >= 0:
        ours, theirs = progression(one), progression(other)
        return kinds <= {"bare", "set"} and ours is not None and ours == theirs
    if kinds == {"tuple"}:
        if one.brackets != other.brackets or len(one.items) != len(other.items):
            return False
        return all(map(same, one.items, other.items))
    if kinds <= {"bare", "set"}:
        ours, theirs = one.items, other.items
        if {one.connective, other.connective} == {"and", "or"}:
            return False
        if kinds == {"bare"} and len(ours) > 2 and all(map(_letter, (*ours, *theirs))):
            return len(ours) == len(theirs) and all(map(same, ours, theirs))  # a ranking
        if kinds != {"bare"}:
            ours, theirs = _distinct(ours), _distinct(theirs)
        return _matched(ours, theirs)
    return False


def _letter(item: Answer) -> bool:
    return isinstance(item, Value) and item.node.op == "symbol" and item.node.name.isupper()


def _distinct(items: Sequence[Answer]) -> tuple[Answer, ...]:
    kept: list[Answer] = []
    for item in items[:MAX_ITEMS]:
        if not any(same(item, each) for each in kept):
            kept.append(item)
    return (*kept, *items[MAX_ITEMS:])


def _matched(ours: Sequence[Answer], theirs: Sequence[Answer]) -> bool:
    """Return whether each of ours is one of theirs, in any order."""
    if len(ours) != len(theirs):
        return False
    if len(ours) > MAX_ITEMS:
        return all(map(same, ours, theirs))
    left = list(theirs)
    for item in ours:
        at = next((index for index, each in enumerate(left) if _alike(item, each) and same(item, each)), None)
        if at is None:
            return False
        del left[at]
    return True


def _alike(one: Answer, other: Answer) -> bool:
    """Return whether both or neither are equations: `x=1` in a list is not 1, or `x=1, y=2` would equal `2, 1`."""
    return isinstance(one, Chain) == isinstance(other, Chain)


def _same_ratios(one: Many, other: Many) -> bool:
    if len(one.items) != len(other.items):
        return False
    if all(map(same, one.items, other.items)):
        return True
    nodes = [item.node for item in (*one.items, *other.items) if isinstance(item, Value) and item.unit == NO_UNIT]
    if len(nodes) != 2 * len(one.items) or all(_clock(many) for many in (one, other)):
        return False
    ours, theirs = nodes[: len(one.items)], nodes[len(one.items) :]
    return all(
        equal_trees(Node("*", (mine, theirs[0])), Node("*", (yours, ours[0])))
        for mine, yours in zip(ours, theirs, strict=True)
    )


def _clock(ratio: Many) -> bool:
    """Return whether it may be a time of day, such as `12:30`."""
    last = ratio.items[-1]
    return isinstance(last, Value) and last.node.op == "number" and 10 <= last.node.value < 60


def _same_values(one: Value, other: Value) -> bool:
    ours, theirs = one.unit, other.unit
    if ours == theirs:
        return equal_trees(one.node, other.node)
    if ours != NO_UNIT and theirs != NO_UNIT:
        return False
    if not may_be_left_out(ours if ours != NO_UNIT else theirs):
        return False
    if equal_trees(one.node, other.node):
        return True
    if PERCENT not in (ours, theirs):
        return False
    percent, rest = (one, other) if ours == PERCENT else (other, one)
    return equal_trees(Node("/", (percent.node, number(100))), rest.node)


def _same_words(one: Answer, other: Answer) -> bool:
    if isinstance(one, Words) and isinstance(other, Words):
        if len(one.parts) != len(other.parts):
            return False
        return all(
            mine == yours if isinstance(mine, str) or isinstance(yours, str) else same(mine, yours)
            for mine, yours in zip(one.parts, other.parts, strict=True)
        )
    if isinstance(one, Opaque) and isinstance(other, Opaque):
        return one.text == other.text
    return False
