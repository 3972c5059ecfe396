r"""The box of a response that is its answer, and its content."""

from __future__ import annotations

import pytest

from slime.core.boxes import Answer, boxed, find_boxes, last_boxed


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{34}", "34"),
        (r"\fbox{34}", "34"),
        (r"$\fbox{\text{B}}$", r"\text{B}"),
        (r"\boxed {34}", "34"),
        ("\\boxed\n  {34}", "34"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{x\right.} }", r"\left\{x\right."),
        (r"a \\\boxed{34}", "34"),  # after a LaTeX line break
        (r"\\boxed{34}", "34"),  # with a backslash that was escaped twice
        # without braces
        (r"$\boxed 34$", "34"),
        (r"so \boxed 5.", "5"),
        (r"so \boxed 5, as said", "5"),
        (r"\boxed5", "5"),
        (r"\boxed -2.5", "-2.5"),
        (r"$\boxed 2\pi$", r"2\pi"),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"\boxed (1, 2) is it", "(1, 2)"),
        (r"\boxed [0,1)", "[0,1)"),
        (r"\(\boxed \{1, 2\}\)", r"\{1, 2\}"),
        (r"\[\boxed 34\]", "34"),
        (r"(that is \boxed 5)", "5"),
        (r"\boxed B", "B"),
        # several boxes: which one counts
        (r"\boxed{1} no, \boxed{34}", "34"),
        (r"\fbox{1} no, \boxed{34}", "34"),
        (r"\boxed{1} no, \fbox{34}", "34"),
        (r"\boxed{1} no, \boxed 34", "34"),
        (r"\boxed{1} \boxed{34}", "34"),
        ("\\boxed{1}\n\n\\boxed{34}", "34"),
        (r"\boxed{\boxed{34}}", "{34}"),
        (r"\boxed{x = \fbox{5}}", "x = {5}"),
        (r"\boxed{1} and so \boxed{34}", "34"),
        (r"{ \boxed{34}", "34"),
        (r"} \boxed{34}", "34"),
        (r"I write \boxed{ and then \boxed{34}", "34"),
        (r"\boxed{1}, then \boxed{ and \boxed{34}", "34"),
        # text about boxes and empty boxes are no answers
        (r"\boxed{34}, in a \boxed as asked", "34"),
        (r"\boxed{34}, in \boxed{} as asked", "34"),
        (r"\boxed{34}. (I used \boxed.)", "34"),
        (r"\boxed{34} \fboxsep{3} \boxedwidth{4}", "34"),
        (r"\boxed", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed as", None),
        (r"\boxed{34", None),
        (r"\boxed{34\}", None),
        (r"\boxed{34} no, \boxed{1", None),
        (r"\boxed{34} no, \fbox{\frac{1}{2}", None),
        ("34", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, held: str | None) -> None:
    assert last_boxed(text) == held


def test_a_text_without_boxes_does_not_break_off() -> None:
    assert find_boxes("34") == [] == find_boxes(r"{\boxed}")
    assert find_boxes(r"\boxed{34") is None
    assert [box.text for box in find_boxes(r"\boxed{1} \boxed{\boxed{2}}") or []] == ["1", "{2}"], (
        "the outer of nested ones"
    )


@pytest.mark.parametrize(
    ("text", "listed", "parts"),
    [
        (r"\boxed{3} and \boxed{5}", "3, 5", ("3", "5")),
        (r"\boxed{3}, \boxed{5}", "3, 5", ("3", "5")),
        (r"$\boxed{3}$ or $\boxed{5}$.", "3, 5", ("3", "5")),
        (r"\(\boxed{3}\), \(\fbox{5}\), and \(\boxed 7\)", "3, 5, 7", ("3", "5", "7")),
        (r"\boxed{3} \text{ and } \boxed{5}", "3, 5", ("3", "5")),
        (r"\boxed{3},\quad \boxed{5}", "3, 5", ("3", "5")),
        (r"**\boxed{3}** & **\boxed{5}**", "3, 5", ("3", "5")),
        (r"\boxed{3}和\boxed{5}", "3, 5", ("3", "5")),
        (r"\boxed{1}. So \boxed{3} and \boxed{5}", "3, 5", ("3", "5")),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2), (3,4)", ("(1,2)", "(3,4)")),
        (r"\boxed{3} and \boxed{3}", "3", ()),
        (r"$x=\boxed{3}$ and $y=\boxed{5}$", "5", ("3", "5")),
        (r"x_1 = \boxed{3}, x_{2} = \boxed{5}", "5", ("3", "5")),
        (r"\boxed{3} \boxed{5}", "5", ()),
        (r"\boxed{3} and then \boxed{5}", "5", ()),
        (r"\boxed{3} and" + " " * 200 + r"\boxed{5}", "5", ()),
    ],
)
def test_boxes_joined_by_a_separator(text: str, listed: str, parts: tuple[str, ...]) -> None:
    assert boxed(text) == Answer(listed, parts)


def test_lists_are_bounded() -> None:
    boxes = [rf"\boxed{{{i}}}" for i in range(21)]
    assert boxed(", ".join(boxes[1:])) == Answer(", ".join(map(str, range(1, 21))), tuple(map(str, range(1, 21))))
    assert boxed(", ".join(boxes)) == boxed(", ".join(boxes[1:])), "the last twenty form the list"
    near, far = (rf"\boxed{{3}},{' ' * spaces}\boxed{{5}}" for spaces in (79, 80))
    assert boxed(near) == Answer("3, 5", ("3", "5")) and boxed(far) == Answer("5")
