"""The table of advantage estimators: where each one's function is, what it needs, and its form of the policy loss.

- Used by: the choices of --advantage-estimator and the rules on flags, the rollout side and training, which look up its
  value. `advantages.ESTIMATORS` imports the functions.
- Invariant: no other place lists the estimators or compares their names. The module does not import torch, because the
  rules read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Surrogate = Literal["token", "sequence", "cispo"]
"""Forms of the policy loss (see `surrogates`): clip each token's ratio, a response's ratio, or a weight."""


@dataclass(frozen=True, kw_only=True)
class EstimatorFacts:
    """Facts about one estimator; the defaults are the common case."""

    file: str | None = None
    """The file in `slime.algo.advantages`, whose function has the same name; None: both have the estimator's."""
    surrogate: Surrogate = "token"
    compares_group: bool = True
    """An advantage compares a sample with the others of its prompt, so a single sample has no advantage."""
    divides_by_std: bool = False
    """Divide advantages by the group's standard deviation, unless --disable-grpo-std-normalization is given."""
    discounts: bool = False
    """Rewards are assigned to tokens and discounted with --gamma."""
    whitens: bool = False
    """Whiten advantages over the whole rollout, also without --normalize-advantages."""
    needs_values: bool = False
    """The estimator needs a critic's value of every token."""
    distills: bool = False
    """Advantages come from a teacher's log-probs; rewards are not used."""


ESTIMATOR_FACTS: Mapping[str, EstimatorFacts] = {
    "grpo": EstimatorFacts(divides_by_std=True),
    "gspo": EstimatorFacts(file="grpo", divides_by_std=True, surrogate="sequence"),
    "cispo": EstimatorFacts(file="grpo", divides_by_std=True, surrogate="cispo"),
    "rloo": EstimatorFacts(),
    "reinforce_plus_plus": EstimatorFacts(compares_group=False, discounts=True, whitens=True),
    "reinforce_plus_plus_baseline": EstimatorFacts(discounts=True, whitens=True),
    "ppo": EstimatorFacts(file="gae", compares_group=False, discounts=True, needs_values=True),
    "on_policy_distillation": EstimatorFacts(compares_group=False, distills=True),
}
"""One row for each value of --advantage-estimator, in the order of its help."""
