"""Flags of the critic, one section of slime's own (see `options`)."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.flags.flag import flag


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """The critic of --advantage-estimator ppo: a model of the policy's shape and layout, with one value a token."""

    critic_load: str | None = flag(
        None,
        "What a new critic starts from: a checkpoint with a critic in it, or a policy's (torch_dist or HF), whose "
        "output layer is left out; unset: what the actor starts from. A resumed run goes on with the critic of --load.",
    )
    critic_lr: float | None = flag(None, "The critic's learning rate; unset: --lr.", ge=0)
    critic_lr_warmup_iters: int = flag(0, "Optimizer steps of its linear warm-up, which is its own.", ge=0)
    value_clip: float = flag(
        0.2,
        "Clip of the value loss: how far a value may go from what it was before the rollout's steps; 0: any way.",
        ge=0,
    )
    num_critic_only_steps: int = flag(
        0, "First rollouts of the run in which the critic alone learns, and the policy stays as it is.", ge=0
    )
