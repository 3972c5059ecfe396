r"""The parts of a structure: its units, its letters, and what may be left out around a whole answer.

- Where it sits: `structure` makes the parts, and `comparison` asks for them.
- Invariant: a qualifier (`k\in\mathbb{Z}`) or a set's braces may be missing on one side. If both sides have them, they
  are compared.
"""

from __future__ import annotations

from dataclasses import replace

from slime.rollout.rewards.answers.structure import Answer, Chain, Many, Region, Value


def units_of(answer: Answer) -> frozenset[str]:
    """Return the units of all values in the answer."""
    if isinstance(answer, Value):
        return frozenset({answer.unit.name} - {""})
    if isinstance(answer, Many):
        inner = answer.items
    elif isinstance(answer, Chain):
        inner = answer.sides
    elif isinstance(answer, Region):
        inner = answer.parts
    else:
        return frozenset()
    return frozenset[str]().union(*(units_of(part) for part in inner))


def names_in(answer: Answer) -> frozenset[str]:
    """Return the letters of all values in the answer."""
    if isinstance(answer, Value):
        return answer.node.names()
    if isinstance(answer, Many):
        return frozenset[str]().union(*map(names_in, answer.items))
    if isinstance(answer, Chain):
        return frozenset[str]().union(*map(names_in, answer.sides))
    return frozenset()


def agree_on_qualifiers(one: Answer, other: Answer) -> bool:
    """Return whether the qualifiers of both are the same, or one of them has none."""
    ours, theirs = _qualified(one)[1], _qualified(other)[1]
    return not ours or not theirs or ours == theirs


def bare(one: Answer, other: Answer) -> tuple[Answer, Answer]:
    r"""Return both without qualifiers, and `\{5\}` as 5 if the other answer is no set."""
    one, other = _qualified(one)[0], _qualified(other)[0]
    sets = [isinstance(each, Many) and each.kind == "set" for each in (one, other)]
    if sets.count(True) != 1:
        return one, other
    return _only_item(one), _only_item(other)


def _only_item(answer: Answer) -> Answer:
    if isinstance(answer, Many) and answer.kind == "set" and len(answer.items) == 1:
        return answer.items[0]
    return answer


def _qualified(answer: Answer) -> tuple[Answer, frozenset[Answer]]:
    r"""Return the answer without qualifiers such as `k\in\mathbb{Z}` about its letters, and these qualifiers."""
    if not isinstance(answer, Many) or answer.kind != "bare" or answer.dots >= 0:
        return answer, frozenset()
    about = [item for item in answer.items[1:] if isinstance(item, Chain) and _is_membership(item)]
    rest = [item for item in answer.items if item not in about]
    if not about or not all(names_in(item.sides[0]) <= names_in(replace(answer, items=tuple(rest))) for item in about):
        return answer, frozenset()
    return (rest[0] if len(rest) == 1 else replace(answer, items=tuple(rest))), frozenset(about)


def _is_membership(chain: Chain) -> bool:
    kinds = chain.sides[-1]
    return chain.relations == ("in",) and isinstance(kinds, Value) and kinds.node.name.startswith("mathbb:")
