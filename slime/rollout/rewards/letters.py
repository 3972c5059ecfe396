r"""Find the letter that an answer chooses among lettered choices.

- Called by: `gpqa` scores with it.
- Invariant: a text that names several letters as its answer, or none, chooses none. A letter in a word, a name or a
  formula (`B-cells`, `E. coli`, `P(B)`, `E=mc^2`) does not count. The time is linear in the length of the text.

The first of these rules that finds a letter decides:

1. Statements of an answer: "the answer is B", "Answer: (B)", "I choose B", \boxed{B}, <answer>B</answer>,
   {"answer": "B"}, and the same in Chinese. The last one counts, unless a judgement after it names another letter.
2. Judgements: "B is correct", "so B.", or a line at the end that is only a letter. All of them have to name one letter.
3. A first or last line that begins with a letter like a choice: "B) 42 J", "(B) because ...".
4. A single letter in brackets, if the text presents it: "it is (B)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slime.config.labels import LETTERS
from slime.core.boxes import find_boxes, join
from slime.rollout.rewards import letter_patterns as regex


@dataclass(frozen=True)
class _Found:
    """A place in the text that names its answer; `letter` is None if it names several letters, or no choice."""

    at: int
    letter: str | None


def chosen_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the letter that an answer chooses; None if it chooses none or several. The module explains the rules."""
    text = text.translate(regex.SPELLING)
    lowered = text.translate(regex.LOWER)
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("```")]
    judged = [*_judged(text, letters), *_concluded(text, lowered, letters)]
    alone = _alone(lines, letters)
    if alone is not None:
        judged.append(_Found(len(text), alone))
    stated = max(_stated(text, lowered, letters), key=lambda found: found.at, default=None)
    if stated is not None:
        later = [found for found in judged if found.at > stated.at]
        return stated.letter if all(found.letter == stated.letter for found in later) else None
    if judged:
        named = {found.letter for found in judged}
        return named.pop() if len(named) == 1 else None
    return _as_a_choice(text, lines, letters) or _bracketed(text, letters)


# --- a letter at a place ------------------------------------------------------------------------------------------


def _letter_at(text: str, at: int, letters: str, *, end: re.Pattern[str] | None = None) -> _Found | None:
    """Return the letter at `at`, after what may precede it; None if no letter there could be an answer.

    `end` is a pattern that has to follow the letter.
    """
    match = regex.LETTER.match(text, at)
    if match is None:
        return None
    letter, after = match["letter"], match.end()
    before = text[match.start("letter") - 1 : match.start("letter")]
    if regex.PART.match(text, after) or regex.DENIED.match(text, after):
        return None
    if text[after : after + 1] in ("'", "’") and not regex.QUOTED.search(text[max(0, after - 21) : after - 1]):
        return None  # A' is something else than A
    if letter.islower() and not (before and before in "([\"'`“‘*") and not regex.END.match(text, after):
        return None
    second = regex.SECOND.match(text, after)
    if second is not None and second[0][-1].upper() != letter.upper():
        return _Found(after, None)
    word = regex.NEXT_WORD.match(text, after)
    if word is not None and not regex.WORDS_AFTER.fullmatch(word[1]) and (letter in "AI" or word[1][0].islower()):
        return None
    if end is not None and not end.match(text, after) and not regex.REASON.match(text, after):
        return None
    letter = letter.upper()
    return _Found(after, letter if letter in letters else None)


def _before(text: str, at: int) -> str:
    return text[max(0, at - regex.LOOK_BACK) : at]


# --- statements and judgements ------------------------------------------------------------------------------------


def _begun(text: str, lowered: str, words: Iterable[str], pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Find matches of a pattern that begins with one of the words; searching a word is far faster than a pattern."""
    for word in words:
        at = lowered.find(word)
        while at >= 0:
            if (match := pattern.match(text, at)) is not None:
                yield match
            at = lowered.find(word, at + 1)


def _stated(text: str, lowered: str, letters: str) -> Iterator[_Found]:
    for patterns, end, denied in (
        (regex.STATED, None, regex.NOT_STATED),
        (regex.STATED_WITH_END, regex.END, regex.NOT_CHOSEN),
    ):
        for words, pattern in patterns:
            for match in _begun(text, lowered, words, pattern):
                found = _letter_at(text, match.end(), letters, end=end)
                before = _before(text, match.start())
                if found is None or regex.ANOTHER_ANSWER.search(match[0]) or regex.NOT_THE_ANSWER.search(before):
                    continue
                if not denied.search(before):
                    yield found
    yield from _in_boxes(text, letters)
    marked = list(regex.DOUBLE_BRACKETS.finditer(text))
    if marked:
        several = len({match[1] for match in marked}) > 1
        yield _Found(marked[-1].end(), None if several or marked[-1][1] not in letters else marked[-1][1])


def _in_boxes(text: str, letters: str) -> Iterator[_Found]:
    """Yield letters in boxes; all boxes that a separator joins have to hold the same letter."""
    boxes = find_boxes(text) or []
    run: set[str | None] = set()
    for place, box in enumerate(boxes):
        alone = regex.ALONE.fullmatch(box.text) if len(box.text) <= regex.LONGEST_ALONE else None
        choice = regex.AS_A_CHOICE.match(box.text)
        found = _letter_at(box.text, 0, letters)
        if alone is not None:
            letter = alone["letter"].upper()
            run.add(letter if letter in letters else None)
        elif choice is not None and found is not None:
            run.add(found.letter)
        elif found is not None and found.letter is None:
            run.add(None)
        if place + 1 < len(boxes) and join(text, box, boxes[place + 1]) is not None:
            continue
        if run:
            yield _Found(box.end, run.pop() if len(run) == 1 else None)
        run = set()


def _judged(text: str, letters: str) -> Iterator[_Found]:
    """Yield places such as "so B is correct", in a clause that contains nothing else."""
    capitals = [capital.start() for capital in regex.CAPITAL.finditer(text)]
    for at in (*capitals, *(small.start(1) for small in regex.SMALL.finditer(text))):
        match = regex.JUDGED.match(text, at)
        if match is None:
            continue
        before = _before(text, match.start())
        sentence = re.split(r"[.!?\n。]", before)[-1]
        clause = regex.CLAUSE.split(sentence)[-1]
        if regex.HYPOTHESIS.search(sentence) or not regex.LEAD.fullmatch(clause):
            continue
        several = match["also"] is not None or regex.LETTER_BEFORE.search(before) is not None
        letter = match["letter"].upper()
        yield _Found(match.start(), None if several or letter not in letters else letter)
    for at in capitals:
        match = regex.JUDGED_CHINESE.match(text, at)
        if match is None:
            continue
        several = re.search(r"[A-J]\s*[和与及或、,]\s*$", _before(text, match.start())) is not None
        yield _Found(match.start(), None if several or match["letter"] not in letters else match["letter"])


def _concluded(text: str, lowered: str, letters: str) -> Iterator[_Found]:
    """Yield places such as "so B." and "it is B."."""
    for match in _begun(text, lowered, regex.CONCLUDED_WORDS, regex.CONCLUDED):
        before = text[max(0, match.start() - 4) : match.start()]
        if match["first"] is not None and before.strip() and "\n" not in before and before.rstrip()[-1] not in ".!?,;":
            continue
        letter = regex.LETTER.match(text, match.end())
        if letter is None or letter["letter"].islower():
            continue
        found = _letter_at(text, match.end(), letters)
        if found is not None and (found.letter is None or regex.SENTENCE_END.match(text, found.at)):
            yield found


# --- letters without a word about them ----------------------------------------------------------------------------


def _alone(lines: list[str], letters: str) -> str | None:
    """Return the letter of a first or last line that is nothing else, if no line is another letter."""
    found = {number: match for number, line in enumerate(lines) if (match := _lone(line)) is not None}
    named = {match.upper() for match in found.values()}
    if len(named) != 1 or not found.keys() & {0, len(lines) - 1}:
        return None
    letter = named.pop()
    return letter if letter in letters else None


def _lone(line: str) -> str | None:
    match = regex.ALONE.fullmatch(line) if len(line) <= regex.LONGEST_ALONE else None
    return None if match is None else match["letter"]


def _as_a_choice(text: str, lines: list[str], letters: str) -> str | None:
    """Return the letter with which the first or the last line begins like a choice, if the text has no others."""
    named = {
        match[1]
        for match in regex.CHOICE_MARK.finditer(text)
        if not re.search(r"[\w(\\]$", text[max(0, match.start() - 2) : match.start()].removesuffix("("))
    }
    for line in lines:
        match = regex.AS_A_CHOICE.match(line)
        if match is not None:
            named.add(match["letter"])
    for line in lines[:1] + lines[-1:]:
        match = regex.AS_A_CHOICE.match(line)
        if match is None or regex.DENIED.match(line, match.end("letter")) or regex.DENIED.match(f" {match['rest']}"):
            continue
        rest = match["rest"]
        if _lone(rest) or (match["mark"] == "." and not _is_a_choice(match["letter"], rest)):
            continue
        return match["letter"] if named == {match["letter"]} and match["letter"] in letters else None
    return None


def _is_a_choice(letter: str, rest: str) -> bool:
    """Return whether "B. ..." is a choice with its text, and neither a name ("E. coli") nor a sentence."""
    words = rest.split()
    sentence = rest.endswith(".") and rest[:1].isalpha() and len(words) > 2
    named = rest[:1].islower() or sentence or regex.NAME_OR_SENTENCE.search(rest) is not None
    return letter != "I" and not named and len(words) <= regex.MAX_CHOICE_WORDS


def _bracketed(text: str, letters: str) -> str | None:
    found = [
        match
        for match in regex.BRACKETED.finditer(text)
        if match[1] in letters and not re.search(r"[\w\\)\]]$", text[max(0, match.start() - 1) : match.start()])
    ]
    if len({match[1] for match in found}) != 1:
        return None
    for match in found:
        before = _before(text, match.start())
        if regex.DENIED.match(text, match.end(1)) or regex.REJECTED.search(re.split(r"[.!?\n]", before)[-1]):
            return None
    presented = any(regex.PRESENTED.search(_before(text, match.start())) for match in found)
    return found[0][1] if presented else None
