"""What belongs to each advantage estimator: the loss's form, and what it reads. One table, without the math.

Path: rules, the rollout side and training ask it by the value of --advantage-estimator; `advantages.ESTIMATORS` has the
functions. Invariant: nothing else knows an estimator by its name. Imports no torch: rules read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Surrogate = Literal["token", "sequence", "cispo"]
"""Forms of the policy loss (`surrogates`): the ratio of a token or of a response is clipped, or a weight is."""


@dataclass(frozen=True, kw_only=True)
class EstimatorFacts:
    """Defaults are grpo's."""

    surrogate: Surrogate = "token"
    compares_group: bool = True
    """An advantage is against the other samples of the prompt: one sample alone has none."""
    divides_by_std: bool = False
    """By that of the group, unless --disable-grpo-std-normalization."""
    discounts: bool = False
    """Rewards stand at tokens, and --gamma discounts them."""
    whitens: bool = False
    """Over the whole rollout, without --normalize-advantages."""
    needs_values: bool = False
    """A critic's, of every token."""
    distills: bool = False
    """Its advantages are of a teacher's log-probs; it reads no reward."""


ESTIMATOR_FACTS: Mapping[str, EstimatorFacts] = {
    "grpo": EstimatorFacts(divides_by_std=True),
    "gspo": EstimatorFacts(divides_by_std=True, surrogate="sequence"),
    "cispo": EstimatorFacts(divides_by_std=True, surrogate="cispo"),
    "rloo": EstimatorFacts(),
    "reinforce_plus_plus": EstimatorFacts(compares_group=False, discounts=True, whitens=True),
    "reinforce_plus_plus_baseline": EstimatorFacts(discounts=True, whitens=True),
    "ppo": EstimatorFacts(compares_group=False, discounts=True, needs_values=True),
    "on_policy_distillation": EstimatorFacts(compares_group=False, distills=True),
}
"""Every value of --advantage-estimator."""
