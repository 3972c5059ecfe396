"""Length limits of prompts and responses, from the flags and from the engines.

- Used by: the data side, which drops long prompts; generation, which ends responses; engines, which refuse requests.
- Invariant: SGLang's limits are written only here. A sample that reaches a limit is truncated, and slime sends no
  request that an engine would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.args import Args

SPARE_TOKENS = 2
"""The positions at the end of the context that SGLang (0.5.16 to 0.5.23) never fills: a response ends before them."""
SPARE_OF_INPUTS = 6
"""SGLang answers 400 to an input of `context - SPARE_OF_INPUTS` tokens or more."""


@dataclass(frozen=True)
class Limits:
    """Largest numbers of tokens; None: no limit."""

    sequence: int | None
    """The limit of prompt and response together."""
    request: int | None
    """The limit of one request's input: the prompt and the response so far."""


def engine_limits(context_length: int) -> Limits:
    """Return the limits of an engine with this context."""
    return Limits(sequence=context_length - SPARE_TOKENS, request=context_length - SPARE_OF_INPUTS - 1)


def context_length(args: Args) -> int | None:
    """Return the smaller of --rollout-max-context-len and the model's number of positions; None: no limit."""
    model = None if args.architecture is None else args.architecture.max_position_embeddings
    return _least(args.rollout_max_context_len, model)


def rollout_limits(args: Args) -> Limits:
    """Return the limits of samples that engines generate."""
    model = None if args.architecture is None else args.architecture.max_position_embeddings
    context: int | None = _least(args.sglang.get("context_length"), model)
    engine = Limits(None, None) if context is None else engine_limits(context)
    sequence = _least(args.rollout_max_context_len, engine.sequence)
    return Limits(sequence, None if sequence is None else _least(engine.request, sequence - 1))


def longest_prompt(args: Args) -> int | None:
    """Return the largest number of tokens in a training prompt; None: no limit.

    With supervised training, no engine receives the prompt, so only the context limits it.
    """
    if args.loss_type != "sft_loss":
        return rollout_limits(args).request
    limit = context_length(args)
    return None if limit is None else limit - 1


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
