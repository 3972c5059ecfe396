"""Flags of advantages and losses, and of the critic.

- Used by: `config.args`, as two of its sections, like those in `options`.
- Invariant: no default of these flags is written anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.flags.flag import Needs, flag


@dataclass(frozen=True, kw_only=True)
class AlgoOptions:
    """Advantages and losses."""

    advantage_estimator: str = flag(
        "grpo",
        "How rewards become advantages. gspo and cispo also change the loss's form. on_policy_distillation uses no "
        "reward: its teacher is the model of --ref-load, and the student starts from --hf-checkpoint.",
        choices=tuple(ESTIMATOR_FACTS),
    )
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = flag(
        "policy_loss",
        "policy_loss: clipped policy gradient. sft_loss: likelihood of the responses. custom_loss: your own function.",
    )
    sft_loss_on: Literal["all_assistant", "last_assistant"] = flag(
        "all_assistant",
        "The messages that SFT on conversations learns from: all of the assistant's, or the last one of each row. "
        "A message's own weight counts as well.",
    )
    use_kl_loss: bool = flag(False, "Add a KL term against the reference model to the loss.")
    kl_loss_coef: float = flag(0.0, "Coefficient of the KL term. At 0 the reference model is not run.", ge=0)
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag(
        "low_var_kl",
        "KL estimator. low_var_kl is k3 with a bound (--kl-clamp).",
        needs=Needs(
            ("use_kl_loss", "log_ref_kl"),
            why="the loss has a KL term only with --use-kl-loss",
            remedy="add --use-kl-loss",
        ),
    )
    kl_coef: float = flag(
        0.0,
        "KL penalty in the reward: this value times log p - log p_ref of each token, where p is the policy before "
        "the rollout's first step. reinforce_plus_plus subtracts it from each token's reward; grpo and rloo subtract "
        "its sum from the response's reward.",
        ge=0,
    )
    kl_clamp: float | None = flag(
        None,
        "Clamp each token's KL estimate to [-X, X]; a token outside gets no gradient from the KL. Unset: 10 in the "
        "loss with --kl-loss-type low_var_kl, otherwise no bound. A value applies to every type, and to the KL of "
        "--kl-coef in the reward. 0: no bound anywhere.",
        ge=0,
        metavar="X",
    )
    log_ref_kl: bool = flag(False, "Run the reference model to log the KL, even at coefficient 0.")
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus in the objective.", ge=0)
    eps_clip: float = flag(0.2, "Clip the policy ratio below at 1 - this value; 1: no clipping below.", ge=0, le=1)
    eps_clip_high: float | None = flag(None, "Clip the policy ratio above at 1 + this value; unset: --eps-clip.", ge=0)
    eps_clip_c: float | None = flag(
        None, "Dual clip: with a negative advantage, the ratio counts as at most this value.", gt=1
    )
    disable_grpo_std_normalization: bool = flag(
        False, "Do not divide the advantages of grpo, gspo and cispo by the group's standard deviation."
    )
    normalize_advantages: bool = flag(
        False, "Whiten advantages over all counted tokens of the rollout (reinforce_plus_plus always does)."
    )
    gamma: float = flag(1.0, "Discount of per-token rewards, in reinforce_plus_plus and ppo.", ge=0, le=1)
    lambd: float = flag(1.0, "GAE lambda.", ge=0, le=1)
    overlong_buffer_len: int | None = flag(
        None,
        "Length penalty: the training reward falls linearly over this many tokens before --rollout-max-response-len. "
        "Unset: no penalty.",
        ge=1,
    )
    overlong_penalty_factor: float = flag(
        1.0,
        "Largest length penalty, which a response of --rollout-max-response-len gets (with --overlong-buffer-len).",
        gt=0,
        needs=Needs(
            ("overlong_buffer_len",), why="no response is penalized for its length", remedy="add --overlong-buffer-len"
        ),
    )
    mask_truncated_samples: bool = flag(
        False,
        "Exclude responses that were cut off at their limit from the loss. Their rewards stay in the group's baseline.",
    )
    offpolicy_correction: Literal["tis", "mis", "none"] = flag(
        "tis",
        "Importance weights of tokens from older policies (partial rollout, train_async.py). tis: truncated at the "
        "clips. mis: tokens beyond the clips are masked. none: these tokens count like all others.",
    )
    use_tis: bool = flag(
        False,
        "Importance weights for all tokens, also those of the current policy, because the log-probs of engine and "
        "trainer never agree to the bit.",
    )
    tis_clip: float = flag(2.0, "Upper clip of importance weights.", gt=0)
    tis_clip_low: float = flag(0.0, "Lower clip of importance weights.", ge=0)
    use_routing_replay: bool = flag(
        False,
        "Mixture of experts: engines report the experts that each token was routed to, and training routes it to the "
        "same ones. The router is trained through the weights that it gives these experts.",
    )


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """The critic of --advantage-estimator ppo: a model like the policy, with one value per token."""

    critic_load: str | None = flag(
        None,
        "Checkpoint from which a new critic starts: a critic's, or a policy's (torch_dist or HF) without its output "
        "layer. Unset: the actor's start. A resumed run continues the critic of --load.",
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
