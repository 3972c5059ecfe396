"""Flags of the critic: one section of slime's own flags (see `options`)."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.flags.flag import flag


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """The critic of --advantage-estimator ppo: a model like the policy, with one value per token."""

    critic_load: str | None = flag(
        None,
        "Checkpoint that a new critic starts from: one that contains a critic, or a policy's (torch_dist or HF), of "
        "which the output layer is not loaded. Unset: the actor's start. A resumed run continues the critic of --load.",
    )
    critic_lr: float | None = flag(None, "The critic's learning rate; unset: --lr.", ge=0)
    critic_lr_warmup_iters: int = flag(0, "Optimizer steps of the critic's own linear warm-up.", ge=0)
    value_clip: float = flag(
        0.2,
        "Clip of the value loss: how far a value may move from its value before the rollout's steps; 0: no clip.",
        ge=0,
    )
    num_critic_only_steps: int = flag(
        0, "Number of rollouts at the start of the run in which only the critic learns.", ge=0
    )
