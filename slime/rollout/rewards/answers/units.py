r"""Units after a value: `5\text{ cm}`, `\$5`, `30^\circ`, `50\%`, `3 apples`.

- Called by: `structure`, to learn whether what follows a value is a unit.
- Invariant: words that change what an answer means (`not`, `north`, `am`, `or more`) are no unit, so they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.rollout.rewards.answers.tokens import Token
from slime.rollout.rewards.answers.vocabulary import (
    CURRENCIES,
    FUNCTIONS,
    MONTHS,
    MULTIPLIERS,
    OTHER_WORDS,
    UNIT_MODIFIERS,
    UNITS,
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit by its shortest name: `cm`, `m/s`, `%`, `deg`; empty if there is none."""

    name: str = ""


NO_UNIT = Unit()
PERCENT = Unit("%")
DEGREE = Unit("deg")
_MAX_WORDS = 6


_NOT_SIMPLE = frozenset({"+", "/", "*", "times", "cdot"})


def money_beginning(tokens: list[Token]) -> tuple[list[Token], Unit]:
    r"""Remove the sign of a currency at the beginning (also after a minus); return the rest and the unit."""
    at = 1 if tokens and tokens[0].text == "-" else 0
    if len(tokens) > at + 1 and tokens[at].text in CURRENCIES.values():
        rest = tokens[:at] + tokens[at + 1 :]
        unit = UNITS[tokens[at].text]
        while rest and rest[-1].kind == "word" and UNITS.get(rest[-1].text) == unit:
            rest = rest[:-1]
        return rest, Unit(unit)
    return tokens, NO_UNIT


def degree_ending(tokens: list[Token]) -> tuple[list[Token], Unit]:
    """Remove a per cent sign, degree sign or ordinal ending from the last factor; return the rest and the unit."""
    texts = [token.text for token in tokens]
    simple = not any(
        token.text in _NOT_SIMPLE or token.text in FUNCTIONS or (token.text == "-" and index)
        for index, token in enumerate(tokens)
    )
    if texts and texts[-1] == "%" and len(texts) > 1 and (simple or (texts.count("%") == 1 and not _sum(tokens[:-1]))):
        return tokens[:-1], PERCENT
    if not simple:
        return tokens, NO_UNIT
    temperature = texts[-1] if len(texts) > 2 and texts[-1] in ("C", "F") else ""
    if temperature:
        texts = texts[:-1]
    for ending in (["^", "{{", "circ", "}}"], ["^", "circ"], ["circ"]):
        if texts[-len(ending) :] == ending and len(texts) > len(ending):
            return tokens[: len(texts) - len(ending)], Unit("deg " + temperature) if temperature else DEGREE
    return tokens, NO_UNIT


def _sum(tokens: list[Token]) -> bool:
    return any(token.text in ("+", "-") for token in tokens[1:])


def scale_of(tokens: list[Token]) -> tuple[int | None, list[Token]]:
    """Return `million` and the like before a unit as a factor, and the other tokens."""
    if tokens and tokens[0].text.lower() in MULTIPLIERS:
        return 10 ** MULTIPLIERS[tokens[0].text.lower()], tokens[1:]
    return None, tokens


def unit_of(tokens: Sequence[Token]) -> Unit | None:
    """Return the unit that all these tokens together are; None if they are none."""
    if not tokens:
        return NO_UNIT
    texts = [token.text for token in tokens if token.text not in ("{{", "}}", "(", ")", ".")]
    words = [token.text for token in tokens if token.kind == "word"]
    if words in (["percent"], ["per", "cent"], ["pct"]) and len(texts) == len(words):
        return PERCENT
    if len(words) > _MAX_WORDS or any(word.lower() in OTHER_WORDS or word.lower() in MONTHS for word in words):
        return None
    name, modifier = "", ""
    for token in tokens:
        text = token.text
        if token.kind == "word" and text in UNIT_MODIFIERS:
            if text.endswith("ed"):
                if not name:
                    return None
                name += UNIT_MODIFIERS[text]
            else:
                modifier = UNIT_MODIFIERS[text]
        elif token.kind == "word":
            name += ("/" if text == "per" else _named(text) + modifier + " ") if text != "of" else " of "
            modifier = ""
        elif token.kind == "number" and name.endswith(("^", "^-")):
            name += text
        elif text in ("^", "/", "-", "cdot", "times"):
            name = name.rstrip() + {"cdot": " ", "times": " "}.get(text, text)
        elif text not in ("{{", "}}", "(", ")", "."):
            return None
    if modifier:
        return None
    name = " ".join(name.replace(" /", "/").replace("/ ", "/").split())
    return Unit(_ALIASES.get(name, name))


_ALIASES = {"mi/h": "mph", "km/h": "kph", "deg C": "deg C", "unit^2": "unit^2"}


def _named(word: str) -> str:
    return (
        UNITS.get(word)
        or UNITS.get(word.lower() if len(word) > 3 else word)
        or f"?{word.lower() if len(word) > 3 else word}"
    )


def may_be_left_out(unit: Unit) -> bool:
    """Return whether an answer without the unit means the same: a known unit, or one plural noun (`apples`)."""
    if "?" not in unit.name:
        return True
    words = unit.name.replace("/", " ").split()
    unknown = [word[1:] for word in words if word.startswith("?")]
    if not all(word.isascii() and word.isalpha() for word in unknown):
        return False
    last = unknown[-1]
    return len(words) <= 3 and len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "ous", "us", "is"))
