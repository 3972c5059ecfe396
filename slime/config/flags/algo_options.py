"""Flags of advantages and losses.

Path: a section of `config.args`, as those in `options` are. Invariant: as there, no default lives anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags.flag import flag


@dataclass(frozen=True, kw_only=True)
class AlgoOptions:
    """Advantages and losses."""

    advantage_estimator: Literal[
        "grpo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
        "on_policy_distillation",
    ] = flag(
        "grpo",
        "How rewards become advantages; gspo and cispo also change the loss's form. on_policy_distillation reads no "
        "reward: its teacher is the model of --ref-load, and the student starts from --hf-checkpoint.",
    )
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = flag(
        "policy_loss", "policy_loss: clipped policy gradient; sft_loss: likelihood of the responses."
    )
    use_kl_loss: bool = flag(False, "Add a KL term against the reference model to the loss.")
    kl_loss_coef: float = flag(0.0, "Its coefficient. At 0 the reference model is not run at all.", ge=0)
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag(
        "low_var_kl", "KL estimator; low_var_kl is k3 with a bound (--kl-clamp)."
    )
    kl_coef: float = flag(
        0.0,
        "KL penalty in the reward: this times log p - log p_ref of each token, by the weights before the rollout's "
        "first step. reinforce_plus_plus takes it from each token's reward; grpo and rloo take its sum from the "
        "response's.",
        ge=0,
    )
    kl_clamp: float | None = flag(
        None,
        "Bound of each token's KL estimate, to [-X, X]; a token beyond it gets no gradient of the KL. Unset: 10 in the "
        "loss with --kl-loss-type low_var_kl, else none. A value is the bound for every type, and for --kl-coef's KL "
        "in the reward. 0: no bound anywhere.",
        ge=0,
        metavar="X",
    )
    log_ref_kl: bool = flag(False, "Run the reference forward to log the KL, even at coefficient 0.")
    entropy_coef: float = flag(0.0, "Weight of the entropy that is added to the objective.", ge=0)
    eps_clip: float = flag(0.2, "The policy ratio is clipped below at 1 - this; 1: not at all.", ge=0, le=1)
    eps_clip_high: float | None = flag(None, "The policy ratio is clipped above at 1 + this; unset: --eps-clip.", ge=0)
    eps_clip_c: float | None = flag(
        None, "Dual clip: with a negative advantage the ratio counts as at most this.", gt=1
    )
    disable_grpo_std_normalization: bool = flag(
        False, "Leave the division by the group's standard deviation out of the advantages of grpo, gspo and cispo."
    )
    normalize_advantages: bool = flag(
        False, "Whiten advantages over all tokens of the rollout that count (reinforce_plus_plus does so by itself)."
    )
    gamma: float = flag(1.0, "Discount of rewards that stand at tokens: reinforce_plus_plus, ppo.", ge=0, le=1)
    lambd: float = flag(1.0, "GAE lambda.", ge=0, le=1)
    overlong_buffer_len: int | None = flag(
        None,
        "Tokens before --rollout-max-response-len over which the reward that training sees falls, the more the longer "
        "the response is; unset: none.",
        ge=1,
    )
    overlong_penalty_factor: float = flag(1.0, "By how much the reward has fallen at the end of them.", gt=0)
    mask_truncated_samples: bool = flag(
        False,
        "A response that was cut off at its limit takes no part in the loss; its reward stays in its group's baseline.",
    )
    offpolicy_correction: Literal["tis", "mis", "none"] = flag(
        "tis",
        "Importance weight of tokens that older weights made (partial rollout, train_async.py). tis: truncated at the "
        "clips; mis: tokens beyond the clips are masked; none: they count like all others.",
    )
    use_tis: bool = flag(
        False,
        "Importance weights for all tokens, the current weights' too: engine and trainer never agree to the bit.",
    )
    tis_clip: float = flag(2.0, "Upper clip of importance weights.", gt=0)
    tis_clip_low: float = flag(0.0, "Lower clip of importance weights.", ge=0)
    use_routing_replay: bool = flag(
        False,
        "Mixture of experts: engines say to which experts each token went, and training sends it to the same ones; the "
        "router is trained by the weights that it gives them.",
    )
