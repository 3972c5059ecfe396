r"""Multiple choice: 1 if the answer chooses the right letter, else 0.

- Called by: `reward` finds it in the table of types.
- Invariant: an answer that names several letters, or none, is wrong. A label that names no letter is an error and not a
  wrong answer.

Source: Rein et al., "GPQA: a graduate-level Google-proof Q&A benchmark", 2023 (arXiv:2311.12022). `letters` explains
where the letter is read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.config.args import Args
from slime.config.labels import LETTERS, right_letter
from slime.core.boxes import Answer
from slime.core.sample import Sample
from slime.rollout.rewards.letters import chosen_letter
from slime.rollout.rewards.response import final_answer
from slime.rollout.rewards.reward import Reward, label_of


def gpqa_score(answer: str | None, label: str, metadata: Mapping[str, Any]) -> float:
    """Return 1 if the answer chooses the right letter, else 0.

    Raises:
        ValueError: the label names no letter.
    """
    choices = metadata.get("choices")
    right = right_letter(label, choices, metadata.get("correct_letter"))
    letters = LETTERS[: len(choices)] if isinstance(choices, list) and choices else LETTERS
    return 1.0 if answer is not None and chosen_letter(answer, letters) == right else 0.0


def _score(args: Args, sample: Sample, answer: Answer | None) -> float:
    return gpqa_score(None if answer is None else answer.text, label_of(sample), sample.metadata)


REWARD = Reward(read=final_answer, score=_score)
