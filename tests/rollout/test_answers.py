"""What counts as an equal answer, pair by pair, and which labels no answer can equal."""

from __future__ import annotations

import pytest

from slime.rollout.rm_hub.mathematics import label_fault


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("34", None),
        (r"\{1,2\}", None),
        (r"the answer is \boxed{\frac{1}{2}}", None),
        (r"\left(1,2\right]", None),
        ("", "empty"),
        (" $$ ", "empty"),
        (r"\boxed{}", "empty"),
        ("She sells 2 a day.\n#### 72", "`####`"),
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
