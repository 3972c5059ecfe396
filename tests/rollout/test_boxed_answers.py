r"""Boxes as the rewards read them, and labels in the form of GSM8K."""

from __future__ import annotations

import pytest

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.rewards.dapo import dapo_answer
from slime.rollout.rewards.reward import find_reward


def reward(rm_type: str, response: str, label: str) -> float:
    value = find_reward(rm_type)(Args(), Sample(response=response, label=label, metadata={}))
    assert isinstance(value, float)
    return value


@pytest.mark.parametrize("rm_type", ["math", "deepscaler", "dapo", "boxed_dapo"])
def test_two_boxes_are_read_as_a_list(rm_type: str) -> None:
    def right(boxes: str, label: str) -> bool:
        return reward(rm_type, f"1</think>so\nAnswer: {boxes}.", label) == 1

    assert right(r"\boxed{3} and \boxed{5}", "3,5")
    assert right(r"$\boxed{5}$ or $\boxed{3}$", "3, 5")
    assert not right(r"\boxed{3} and \boxed{5}", "5")
    assert not right(r"\boxed{3}, \boxed{5}", "3")
    assert right(r"\boxed{\frac12} or \boxed{0.5}", "0.5")  # one value, written twice
    assert not right(r"\boxed{\frac12} or \boxed{0.6}", "0.5")
    assert right(r"$x=\boxed{3}$, $y=\boxed{5}$", "3, 5")
    assert right(r"$x=\boxed{3}$, $y=\boxed{5}$", "5")
    assert not right(r"$x=\boxed{3}$, $y=\boxed{5}$", "3")
    assert right(r"\boxed{3} no, \boxed{5}", "5")
    assert not right(r"\boxed{3} no, \boxed{5}", "3, 5")


def test_no_letter_is_chosen_by_two_boxes() -> None:
    assert reward("boxed_gpqa", r"\boxed{B}", "B") == 1
    assert reward("boxed_gpqa", r"\boxed{A} and \boxed{B}", "B") == 0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"Answer: \fbox{34}", "34"),
        (r"Answer: $\boxed 34$", "34"),
        (r"Answer: \boxed {34}", "34"),
        ("Answer: \\boxed{\n34\n}", "\n34\n"),  # the box ends where its braces close
        ("Answer: \\boxed{34}\nas said in \\boxed{1}", "34"),
        ("Answer: \\boxed{34}\nand \\boxed{1", "34"),
        (r"Answer: \boxed{3} and \boxed{5}", "3, 5"),
        (r"Answer: \boxed{}", None),
        (r"Answer: \boxed{34", None),
        (r"Answer: 34 \boxed{35", None),
        ("**Answer:** **34**", "34"),
        ("Answer: 34 ** ", "34"),
        (r"\textbf{Answer:} 34", "34"),
        (r"\textbf{Answer: } $34$", "$34$"),
        (r"\textbf{Answer}: 34", "34"),
    ],
)
def test_boxes_after_answer(response: str, answer: str | None) -> None:
    assert dapo_answer(response) == answer


@pytest.mark.parametrize("rm_type", ["math", "deepscaler", "dapo", "boxed_math"])
def test_a_label_in_gsm8k_form_is_read(rm_type: str) -> None:
    def right(answer: str, label: str) -> bool:
        return reward(rm_type, f"so</think>Answer: \\boxed{{{answer}}}", label) == 1

    assert right("72", "48 + 24 = <<48+24=72>>72\n#### 72")
    assert not right("48", "48 + 24 = <<48+24=72>>72\n#### 72")
    assert right("1072", "#### 1,072")
    assert right("-3.5", "#### -3.50")
    with pytest.raises(ValueError, match="2 marks"):
        right("72", "#### 71\n#### 72")
