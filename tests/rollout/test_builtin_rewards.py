"""The score of each built-in reward for a response: tables, and independent formulas where they exist."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.config.args import Args
from slime.config.labels import right_letter
from slime.config.reward_types import BOXED_PREFIX, REWARD_TYPES, needs_url
from slime.core.boxes import last_boxed
from slime.core.sample import Sample
from slime.rollout.rewards import mathematics
from slime.rollout.rewards.dapo import dapo_answer
from slime.rollout.rewards.deepscaler import boxed_answer, deepscaler
from slime.rollout.rewards.f1 import accepted, f1_score, normalise
from slime.rollout.rewards.letters import chosen_letter
from slime.rollout.rewards.response import final_text
from slime.rollout.rewards.reward import find_reward, reward_of

R = "2+2</think>so "


def reward(rm_type: str, response: str, label: str | None = None, **metadata: Any) -> float:
    value = find_reward(rm_type)(Args(), Sample(response=response, label=label, metadata=metadata))
    assert isinstance(value, float)
    return value


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (R + r"\boxed{34}", "34", 1),
        (R + r"\boxed{35}", "34", 0),
        (R + r"\boxed{34}<|user|>", "34", 1),
        (r"\boxed{34}", "34", 0),  # no </think>
        (r"\boxed{34}</think> 34", "34", 0),  # boxed before it only
        (r"\boxed{1}</think>\boxed{34}</think>\boxed{7}", "7", 1),  # the last </think> counts
        (r"</think>\boxed{34}</think>", "34", 0),
        (R + r"\boxed{1} no, \boxed{34}", "34", 1),
        (R + r"\boxed{34} no, \boxed{1}", "34", 0),
        (R + r"\boxed{34} no, \boxed{1", "34", 0),  # the last box does not close
        (R + r"\boxed{\boxed{34}}", "34", 1),
        (R + r"\boxed {34}", "34", 1),
        (R + r"\boxed{}", "34", 0),
        (R + "34", "34", 0),
        ("", "34", 0),
        (R + r"\boxed{34}", "", 0),
    ],
)
def test_deepscaler_rule(response: str, label: str, expected: float) -> None:
    assert deepscaler(response, label) == expected
    assert reward("deepscaler", response, label) == expected


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("0.5", r"\frac{1}{2}", 1),
        (r"\dfrac{2}{4}", r"\frac12", 1),
        ("1/3", "0.333", 0),
        ("3", "3.0", 1),
        ("34", "34.0", 1),
        ("34.", "34", 1),
        ("3.4", "34", 0),
        ("007", "7", 1),
        ("-7", "7", 0),
        ("\u22127", "-7", 1),  # a minus sign that is not a hyphen
        ("$34$", "34", 1),
        ("$34$.", "34", 1),
        ("x=34", "34", 1),
        ("30+4=34", "34", 1),
        ("35=34", "34", 0),
        ("34=35", "34", 0),
        ("1,234", "1234", 1),
        ("12,34", "1234", 0),
        (r"1\,234", "1234", 1),
        (r"1\ 234\,567.5", "1234567.5", 1),
        ("1 234", "1234", 1),
        ("12 34", "1234", 0),
        ("1e6", "1000000", 1),
        (r"1.5 \times 10^{-7}", "0.00000015", 1),
        (r"1.38\times 10^{-23}", r"6.63\times 10^{-34}", 0),  # an absolute tolerance would find them equal
        ("0.0000001", "0.0000002", 0),
        ("3.1415927", "3.14159265", 1),
        ("4.0000001", "4", 0),
        ("1" * 30, "1" * 29 + "2", 0),
        (r"50\%", "0.5", 1),
        (r"50\%", "50", 1),
        (r"\{2,1\}", r"\{1,2\}", 1),
        ("(2,1)", "(1,2)", 0),
        ("(x+1)^2", "x^2+2x+1", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("34", r"The answer is \boxed{34}", 1),
        ("34, 35", "34", 0),
        ("34 or 35", "34", 0),
        (r"34 \text{ or } 35", "34", 0),
        (r"\pm 34", "34", 0),
        ("34x", "34", 0),
        ("not 34", "34", 0),
        ("__import__('os').abort()", "34", 0),
        ("1" * 400, "34", 0),
        ("1+" * 5000 + "1", "5001", 0),  # too long to be parsed
    ],
)
def test_equality_of_mathematics(answer: str, label: str, expected: float) -> None:
    boxed = rf"so \boxed{{{answer}}}"
    assert reward("deepscaler", "</think>" + boxed, label) == expected
    assert reward("math", boxed, label) == expected
    assert reward("dapo", "Answer: " + boxed, label) == (1 if expected else -1)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{34}", 1),  # no </think> is required
        (r"\boxed{34}</think> done", 1),
        (r"\boxed{35}</think>\boxed{34}", 1),
        (r"\boxed{34}</think>\boxed{35}", 0),
        (r"\boxed{34} and then \boxed{", 0),
        ("Answer: 34", 0),
        ("", 0),
    ],
)
def test_math_rule(response: str, expected: float) -> None:
    assert reward("math", response, "34") == expected


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 34", "34"),
        (r"Answer: \boxed{34}", "34"),
        (r"Answer: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("answer : 34", "34"),
        ("**Answer:** 34", "34"),
        ("**Answer: 34**", "34"),
        ("Final Answer: 34<|user|>", "34"),
        ("Answer:\n34", "34"),
        ("Answer:\n\\[\n\\boxed{34}\n\\]", "34"),
        ("Answer: $$\n34\n$$", "34"),
        ("Answer: `34`", "34"),
        ("Answer: 34\nThat is all.", "34"),
        ("Answer: 34\nAnswer: 35", "35"),
        ("Answer: 34. Answer: 35", "35"),
        ("The user says: 'Answer: 34'. Answer: 35", "35"),
        ("Answer: 34\n" + "no, " * 200 + "\nAnswer: 35", "35"),
        ("Answer: 34" + " and on and on" * 30, None),  # beyond the last 300 characters
        ("Answer: 34" + " " * 400, "34"),
        ("Answer:", None),
        ("Answer: <|endoftext|>", None),
        ("Answer is 34", None),
        (r"\boxed{34}", None),
        ("34", None),
        ("", None),
    ],
)
def test_dapo_answer(response: str, answer: str | None) -> None:
    assert dapo_answer(response) == answer


def test_dapo_is_right_or_wrong_and_never_zero() -> None:
    assert reward("dapo", "Answer: 34", "34") == 1
    assert reward("dapo", "Answer: 68/2", "34") == 1
    for wrong in ("Answer: 35", "Answer:", "", "34", r"\boxed{34}", r"Answer: \boxed{}", "Answer: 34 35"):
        assert reward("dapo", wrong, "34") == -1, wrong


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a</think>b<|user|>", "b"),
        ("Paris</s>", "Paris"),
        ("x<|im_end|>\n<|endoftext|>\n", "x"),
        ("x<end_of_turn>", "x"),
        ("x<｜end▁of▁sentence｜>", "x"),
        ("<|eot_id|>", ""),
        ("a <b> c", "a <b> c"),
        ("if a <|b", "if a <|b"),
        ("a</think>b</think>", ""),
        ("no thought", "no thought"),
    ],
)
def test_final_text(text: str, end: str) -> None:
    assert final_text(text) == end


def _f1(words: str, label_words: str) -> float:
    """Compute F1 by its definition, 2PR / (P + R), with each shared word counted as often as in both."""
    ours, theirs = words.split(), label_words.split()
    left, shared = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = Fraction(shared, len(ours)), Fraction(shared, len(theirs))
    return float(2 * precision * recall / (precision + recall))


WORDS = st.lists(st.sampled_from(["paris", "rome", "nine", "york"]), min_size=1, max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_f1_by_its_definition(words: str, label: str) -> None:
    assert f1_score(words, label) == pytest.approx(_f1(words, label))


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("the  Eiffel-Tower", "EiffelTower", 1),
        ("in Paris, France", "Paris", 0.5),
        ("paris paris paris", "Paris", 0.5),
        ("Paris", "Paris, France", 2 / 3),
        ("Rome", "Paris", 0),
        ("", "Paris", 0),
        ("the", "Paris", 0),
        ("", "the", 0),
        ("The", "the", 1),
        ("+", "+", 1),
        ("-", "+", 0),
        ("yes", "Yes.", 1),
        ("yes, it is", "yes", 0),  # it counts only as a whole
        ("no", "yes", 0),
        ("Ünïted", "ünïted", 1),
        ("Paris", '["Rome", "Paris, France", "Paris"]', 1),
        ("Paris", '["Rome", "Paris, France"]', 2 / 3),
        ("1 2", "[1, 2]", 1),  # not a list of texts: the label itself
        ("Paris", "[Paris", 1),
        ("a", "[]", 0),
    ],
)
def test_f1(answer: str, label: str, expected: float) -> None:
    assert f1_score(answer, label) == pytest.approx(expected)


def test_f1_judges_the_text_after_the_thought() -> None:
    assert reward("f1", "is it Rome? no</think>Paris<|user|>", "Paris") == 1
    assert reward("f1", "is it Paris?</think>Rome", "Paris") == 0
    assert reward("f1", "Paris", "Paris") == 1
    assert reward("boxed_f1", r"it is \boxed{the Paris}, I think", "Paris") == 1
    assert reward("boxed_f1", "Paris", "Paris") == 0
    assert accepted('["a", 1]') == ['["a", 1]']
    assert normalise("An  apple: a-day, the") == "apple aday"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B.", "B"),
        ("The correct answer is (B)", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("**Answer: (B)**", "B"),
        ("Answer:\nB", "B"),
        ("Answer: B) Paris", "B"),
        ("Answer: B - Paris", "B"),
        ("the answer is therefore option B", "B"),
        ("The correct choice is: B", "B"),
        (r"\boxed{B}", "B"),
        (r"the answer is $\boxed{\text{(B)}}$", "B"),
        (r"\(\boxed{\mathrm{B}}\)", "B"),
        ("The answer is A because B is wrong", "A"),
        ("The answer is A. No: the answer is B", "B"),
        ("The answer is A, thus \\boxed{B}", "B"),
        ("Ignore this. Answer: A\n\nAnswer: C", "C"),
        ("It is (C): (C) alone fits", "C"),
        ("b", "B"),
        (" (b). ", "B"),
        ("(A) or (B)", None),
        ("Options are (A) x, (B) y, (C) z", None),
        ("Answer: A or B", None),
        ("Answer: A, B", None),
        ("Answer: B and C", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{A\text{ or }B}", None),
        ("The answer is B. No: the answer is C or D", None),
        ("Answer: I think it is B", None),
        ("Answer: A careful look at it", None),
        ("the answer is a good one", None),
        ("the answer is not B", None),
        ("the answer isn't B", None),
        ("Answer: B-cells", None),
        ("Answer: C60", None),
        (r"\boxed{E=mc^2}", None),
        (r"\boxed{A+B}", None),
        (r"\boxed{}", None),
        ("Because A", None),
        ("", None),
    ],
)
def test_the_letter_chosen(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter
    if letter is not None:
        assert reward("gpqa", "A</think>" + text + "<|user|>", letter) == 1
        assert reward("gpqa", text + "</think>", letter) == 0
    for other in "ABCDEFGHIJ".replace(letter or "-", ""):
        assert reward("gpqa", text, other) == 0


def test_the_letter_that_a_text_states() -> None:
    """Usual ways to state B, and texts that state no letter, or several."""
    missed: list[tuple[str, str | None, str]] = []
    lines = Path(__file__).with_name("stated_letters.tsv").read_text(encoding="utf-8").splitlines()[1:]
    for line in lines:
        truth, text = line.split("\t", 1)
        chosen = chosen_letter(text.replace("⏎", "\n"))
        if chosen != (None if truth == "-" else truth):
            missed.append((truth, chosen, text))
    assert missed == []
    assert len(lines) > 800, "control"


def test_letters_beyond_the_choices_do_not_count() -> None:
    assert chosen_letter("The answer is E", "ABCDE") == "E"
    assert chosen_letter("The answer is E", "ABCD") is None
    assert chosen_letter("The answer is A. Rather, the answer is E", "ABCD") is None
    assert reward("gpqa", "Answer: E", "E", choices=["a", "b", "c", "d", "e"]) == 1
    assert reward("gpqa", "Answer: E", "E", choices=["a", "b", "c", "d"]) == 0


def test_the_right_letter() -> None:
    choices = ["Rome", "Paris", "C"]
    assert right_letter("B") == right_letter("(b)") == right_letter("Paris", choices) == "B"
    assert right_letter("whatever", None, "b") == "B"
    assert right_letter("A", choices, "C") == "C"  # metadata.correct_letter takes precedence
    assert right_letter("C", choices) == "C"
    with pytest.raises(ValueError, match=r"'C' is a letter and also the text of choice B.*correct_letter"):
        right_letter("C", ["H", "C", "N"])
    with pytest.raises(ValueError, match="neither a letter"):
        right_letter("Oslo", choices)
    with pytest.raises(ValueError, match="correct_letter is 'Z'"):
        right_letter("A", choices, "Z")
    assert reward("gpqa", "Answer: B", "Paris", choices=choices) == 1
    assert reward("gpqa", "Answer: A", "Paris", choices=choices) == 0
    assert reward("boxed_gpqa", r"Answer: A, I mean \boxed{b}", "Paris", choices=choices) == 1


@pytest.mark.parametrize("rm_type", [name for name in REWARD_TYPES if not needs_url(name) and name != "code"])
def test_boxed_judges_the_content_of_the_last_box(rm_type: str) -> None:
    """With every type only the box counts: no </think>, no "Answer:" and no words around it are required."""
    worst = min(reward(rm_type, text, "B") for text in ("A", "", "</think>", "Answer: A"))
    if rm_type == "random":
        assert reward("boxed_random", "") == reward("random", "")
        return
    assert reward(BOXED_PREFIX + rm_type, r"\boxed{A} no, \boxed{B} it is", "B") == 1
    for wrong in (r"\boxed{B} no, \boxed{A}", r"</think>Answer: B", r"\boxed{}", r"\boxed{B", ""):
        assert reward(BOXED_PREFIX + rm_type, wrong, "B") == worst, wrong


def test_every_name_has_a_rule() -> None:
    assert [name for name in REWARD_TYPES if reward_of(name) is None] == ["remote_rm"]
    for name in ("bogus", "boxed_", "boxed_boxed_math", "MATH", ""):
        with pytest.raises(ValueError, match="no such reward"):
            find_reward(name)
    for name in set(REWARD_TYPES) - {"random", "remote_rm", "code"}:
        with pytest.raises(ValueError, match="no label"):
            reward(name, r"</think>\boxed{1}")


def test_boxed_answer_keeps_nested_and_escaped_braces() -> None:
    assert boxed_answer(R + r"\boxed{\frac{1}{\sqrt{2}} \} }.") == r"\frac{1}{\sqrt{2}} \} "


READERS: list[Callable[[str], object]] = [last_boxed, boxed_answer, dapo_answer, final_text, chosen_letter, normalise]


@pytest.mark.parametrize(
    "unit",
    [
        *(r"\boxed{", r"\boxed", "}", "{", "Answer: ", "answer is ", "(A)", "*", "answer ", " ", "\n", "</think>"),
        *("<|a|>", "<|", "A or ", "the ", "\\"),
        *(r"\boxed (", r"\boxed{1},", r"\boxed{\boxed{1}}", r"\boxed{A} and "),
        *("A ", "A is correct. ", "The answer is that ", "I choose ", "答案是A和", "A) x "),
    ],
)
def test_reading_an_answer_is_linear(unit: str) -> None:
    """A text ten times as long takes about ten times as long; with a quadratic reader it would take a hundred times."""

    def seconds(length: int) -> float:
        """Return the minimum of some tries, because other work on the machine only adds to it."""
        text = unit * (length // len(unit))
        tries: list[float] = []
        for _ in range(3):
            start = time.process_time()
            for reader in READERS:
                reader(text)
            tries.append(time.process_time() - start)
        return min(tries)

    short, long = max(seconds(10_000), 1e-3), seconds(100_000)
    assert long < 40 * short, f"{short:.4f} s for 10,000 characters, {long:.4f} s for 100,000"


def test_no_reward_executes_a_response_or_a_label(tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = f"__import__('pathlib').Path({str(made)!r}).touch()"
    sum_of_it = f"sum([{code} or 1])"
    latex = code.replace("_", r"\_")
    for rm_type in set(REWARD_TYPES) - {"remote_rm", "code"}:  # tests/sandbox runs code, and attacks
        for text in (code, sum_of_it, latex, f"lambda: {code}", f"1 + ({code} or 1)", f"Symbol({code!r}, {code})"):
            for response in (text, R + text, R + rf"\boxed{{{text}}}", f"Answer: {text}", f"Answer: ${text}$"):
                for label in (text, rf"\boxed{{{text}}}", "1"):
                    find_reward(rm_type)(Args(), Sample(response=response, label=label, metadata={"choices": [label]}))
    assert not made.exists()
    eval(sum_of_it)
    assert made.exists(), "control"


def test_a_worker_requires_a_parser_with_known_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    mathematics.warm_up()
    monkeypatch.setattr(mathematics, "KNOWN", (("1", "1", True), ("x+1", "x+2", True)))
    with pytest.raises(RuntimeError, match=r"x\+1 is found unlike x\+2: a parser does not work here; pip install"):
        mathematics.warm_up()
