"""How long prompt and response may be: by the flags, and by what an engine takes.

Path: prompts are dropped, responses end and requests are refused by these. Invariant: SGLang's limits are written down
here and nowhere else; a sample that one of them ends is truncated, and nothing is sent that an engine would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.args import Args

SPARE_TOKENS = 2
"""Positions of the context that SGLang (0.5.16 to 0.5.23) never fills: a response ends before them."""
SPARE_OF_INPUTS = 6
"""SGLang answers 400 to an input of so many tokens less than the context, or longer."""


@dataclass(frozen=True)
class Limits:
    """Tokens at most; None: nothing limits them."""

    sequence: int | None
    """Prompt and response together."""
    request: int | None
    """The input of one request: the prompt, and what there is of the response."""


def engine_limits(context_length: int) -> Limits:
    """The limits of an engine with this context."""
    return Limits(sequence=context_length - SPARE_TOKENS, request=context_length - SPARE_OF_INPUTS - 1)


def context_length(args: Args) -> int | None:
    """--rollout-max-context-len, or the model's positions where they are fewer."""
    model = None if args.architecture is None else args.architecture.max_position_embeddings
    return _least(args.rollout_max_context_len, model)


def rollout_limits(args: Args) -> Limits:
    """Limits of samples that engines generate."""
    model = None if args.architecture is None else args.architecture.max_position_embeddings
    context: int | None = _least(args.sglang.get("context_length"), model)
    engine = Limits(None, None) if context is None else engine_limits(context)
    sequence = _least(args.rollout_max_context_len, engine.sequence)
    return Limits(sequence, None if sequence is None else _least(engine.request, sequence - 1))


def longest_prompt(args: Args) -> int | None:
    """Tokens of a training prompt at most; under supervised training no engine has to take it."""
    if args.loss_type != "sft_loss":
        return rollout_limits(args).request
    limit = context_length(args)
    return None if limit is None else limit - 1


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
