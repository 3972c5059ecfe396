"""The router's policy: round robin, or cache_aware, which sends the samples of a prompt to one engine.

- Used by: the rollout manager when it starts the run's own router, and the survey of a --dry-run, which prints it.
- Invariant: flags of the user (--router-policy and its settings) always count.

Round robin gives every engine equally many samples, but the n samples of a prompt go to min(n, engines) engines, and
each of them computes the prompt. On one engine the prefix cache has it after the first sample. cache_aware balances
prompts instead of samples, so engines finish less evenly. It is chosen where it saves at least `LEAST_SAVING` of the
engines' time. For example, 8 samples on 8 engines: prompts of 12,000 tokens cost 10,500 tokens of prefill more for
each sample. At `PREFILL_COST` that is the time of 2,100 generated tokens, so cache_aware is chosen if responses have
at most 21,000 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slime.config.args import Args

PREFILL_COST = 0.2
"""The time of one token of prefill over that of one generated token: an estimate for the batches of a rollout."""
LEAST_SAVING = 0.1
"""The share of the time to generate the longest responses that cache_aware has to save."""
CACHE_THRESHOLD = 0.7
"""A request goes to the engine that has this share of its prompt.

A common system prompt must not attract all prompts to one engine, as it does at the router's own 0.3; the next turn of
a conversation must go to the engine that has the last one.
"""
UNEVEN_GROUPS = 2
"""The number of whole groups by which engines may differ before the router prefers the one with fewest requests.

The router's own limit is 64 requests, which can be more than an engine ever has.
"""
UNEVEN_SHARE = 1.1
"""The ratio of the most to the fewest requests of an engine above which `UNEVEN_GROUPS` counts."""


@dataclass(frozen=True)
class RouterPolicy:
    """A policy of sglang-router, its settings as --router-* flags without the prefix, and the reason for it."""

    name: str
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def router_policy(args: Args, prompt_tokens: float | None) -> RouterPolicy:
    """Choose the policy of the run's own router.

    Args:
        prompt_tokens: the mean tokens in a training prompt; None if it is not known.
    """
    if (given := args.router.get("policy")) is not None:
        return RouterPolicy(str(given), "--router-policy")
    if args.num_engines < 2:
        return RouterPolicy("round_robin", "there is only one engine")
    if not args.engine.caches_prefixes or args.sglang.get("disable_radix_cache"):
        return RouterPolicy("round_robin", "engines do not keep a prompt for other samples")
    samples = args.resolved.n_samples_per_prompt
    if args.custom_generate_function_path is not None:
        why = "--custom-generate-function-path may have several turns, each of which repeats those before it"
        return _cache_aware(why, samples)
    if prompt_tokens is None:
        return RouterPolicy("round_robin", "the length of prompts is not known")
    most = args.rollout_max_response_len
    saved = prompt_tokens * (min(samples, args.num_engines) - 1) / samples
    figures = f"{saved:,.0f} tokens of prefill for each sample, whose response has up to {most:,}"
    if PREFILL_COST * saved < LEAST_SAVING * most:
        return RouterPolicy("round_robin", f"cache_aware would save only {figures}")
    return _cache_aware(f"it saves {figures}", samples)


def _cache_aware(why: str, samples: int) -> RouterPolicy:
    settings = {
        "policy": "cache_aware",
        "cache_threshold": CACHE_THRESHOLD,
        "balance_abs_threshold": UNEVEN_GROUPS * samples,
        "balance_rel_threshold": UNEVEN_SHARE,
    }
    return RouterPolicy("cache_aware", why, settings)


def with_router_policy(args: Args, policy: RouterPolicy) -> Args:
    """Return Args whose router has this policy; what the user gave stays."""
    return replace(args, router={**policy.settings, **args.router})
