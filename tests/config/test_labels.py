"""Labels that no answer can match are found before anything starts, by the rules of each reward type."""

from __future__ import annotations

import json
from typing import Any

import pytest
from config_run import MESSAGE, Run

from slime.config.labels import label_fault, right_letter, stated_answer


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("34", None),
        (" -34.50 ", None),
        (r"\{1,2\}", None),
        (r"the answer is \boxed{\frac{1}{2}}", None),
        (r"\left(1,2\right]", None),
        (r"\left\{x=1\right.", None),
        ("She sells 2 a day.\n#### 72", None),
        ("#### 1,234", None),
        ("", "empty"),
        (" $$ ", "empty"),
        (".", "empty"),
        (r"\boxed{}", "empty"),
        (r"\text{ }", "empty"),
        (r"\frac12", None),
        (r"\frac\pi{2}+\dfrac{\frac{1}{2}}3+\sqrt[3]{2}+\sqrt2+\binom{5}{2}", None),
        (r"\frac{\{1\}}{2}", None),
        (r"\fracture", None),
        (r"\frac{1}", r"\frac has 1 of its 2 arguments"),
        (r"1+\frac{1}{}", r"\frac has 1 of its 2 arguments"),
        (r"\frac", r"\frac has 0 of its 2 arguments"),
        (r"2\sqrt{\sqrt}", r"\sqrt has 0 of its 1 arguments"),
        ("####", "nothing follows"),
        ("She sells 2 a day.\n#### ", "nothing follows"),
        ("#### 3\n#### 4", "2 marks"),
        ("#### 3\nand more", "more than one line"),
        (r"#### \frac{1}{2", "never closed"),
        (r"\frac{1}{2", "never closed"),
        (r"\boxed{34", "never closed"),
        ("2}", "closes no"),
        (r"\left(1,2", r"1 \left and 0 \right"),
        (r"\begin{cases}x=1\\y=2", r"1 \begin and 0 \end"),
        ("1" * 2000, "2000 characters"),
    ],
)
def test_fault_of_a_label(label: str, fault: str | None) -> None:
    found = label_fault(label)
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("72", "72"),
        ("a\nb\n#### 72", "72"),
        ("#### 72\n", "72"),
        ("####72", "72"),
        ("2 * 3 = <<2*3=6>>6\n#### -1,072.50", "-1,072.50"),
    ],
)
def test_the_answer_of_a_gsm8k_solution(label: str, answer: str) -> None:
    assert stated_answer(label) == answer


def _rows(run: Run, *rows: dict[str, Any]) -> None:
    run.data.write_text("".join(json.dumps(MESSAGE | row) + "\n" for row in rows))


@pytest.mark.parametrize("rm_type", ["math", "deepscaler", "dapo", "boxed_math", "boxed_dapo"])
def test_labels_of_mathematics(run: Run, rm_type: str) -> None:
    _rows(run, {"label": "so\n#### 72"}, {"label": 72}, {"label": 72.5}, {"label": r"\frac12"}, {"label": "km"})
    assert run.errors("--rm-type", rm_type) == []
    _rows(run, {"label": "72"}, {"label": "so\n#### "}, {"label": "#### 1\n#### 2"}, {"label": r"\frac{1}{2"})
    errors = run.errors("--rm-type", rm_type)
    assert [error.partition(": ")[0] for error in errors] == [f"{run.data}:{line}" for line in (2, 3, 4)]
    assert errors[2] == (
        rf"{run.data}:4: no answer can equal its label '\\frac{{1}}{{2' as {rm_type} compares them: a `{{` is never "
        "closed; correct the line"
    )
    for other in ("random", "f1"):  # the first reads no label, the second compares words
        assert run.errors("--rm-type", other) == []


def test_a_long_label_is_shown_by_its_end(run: Run) -> None:
    _rows(run, {"label": "She sells two a day. " * 20 + "\n####"})
    assert r"two a day. \n####' as deepscaler compares them: nothing follows ####" in run.error()


def test_labels_of_choices(run: Run) -> None:
    choices = {"metadata": {"choices": ["Rome", "Paris", "Oslo"]}}
    _rows(
        run,
        *({"label": "B"}, {"label": "(b)"}, {"label": "Paris"} | choices, {"label": "B"} | choices),
        {"label": "51", "metadata": {"correct_letter": "C"}},
    )
    assert run.errors("--rm-type", "gpqa") == []
    _rows(
        run,
        *({"label": "B"}, {"label": "Paris"}, {"label": "Bern"} | choices, {"label": "D"} | choices),
        {"label": "", "metadata": {}},
        {"label": "B", "metadata": {"correct_letter": "Z"}},
        {"label": "#### B", "metadata": {}},
    )
    errors = run.errors("--rm-type", "boxed_gpqa")
    assert [error.partition(": ")[0] for error in errors[:5]] == [f"{run.data}:{line}" for line in range(2, 7)]
    assert errors[0] == (
        f"{run.data}:2: boxed_gpqa finds no right choice: the label 'Paris' is neither a letter (A to J) nor one of "
        "metadata.choices []; give it a letter, the text of one of metadata.choices, or metadata.correct_letter"
    )
    assert "the right letter is D, but there are only 3 choices" in errors[2]
    assert errors[5].startswith(f"{run.data}: 1 more of 7 rows")


def test_a_rows_own_type_checks_its_label(run: Run) -> None:
    gpqa = {"rm_type": "gpqa"}
    _rows(run, {"label": "51"}, {"label": "51", "metadata": gpqa}, {"label": "####", "metadata": {"rm_type": "f1"}})
    assert run.error("--rm-type", "math").startswith(f"{run.data}:2: gpqa finds no right choice: the label '51' is")


def test_labels_of_an_evaluation_set(run: Run) -> None:
    held_out = run.directory / "held-out.jsonl"
    held_out.write_text(json.dumps({**MESSAGE, "label": "{"}) + "\n")
    words = ("--eval-prompt-data", "a", str(held_out))
    assert run.error(*words).startswith(f"{held_out}:1: no answer can equal its label '{{' as deepscaler")
    assert run.errors(*words, "--eval-rm-type", "f1") == []


def test_a_choice_has_one_letter() -> None:
    with pytest.raises(ValueError, match="several choices"):
        right_letter("Paris", ["Paris", "Rome", "Paris"])
    assert right_letter("Paris", ["Paris", "Rome", "Paris"], "C") == "C"
    with pytest.raises(ValueError, match="is choice 11, but letters end at J"):
        right_letter("10", [str(number) for number in range(12)])
