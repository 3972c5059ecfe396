"""The rollout for supervised fine-tuning: responses come from the data, and no engine is used.

- Where it sits: --rollout-function-path chooses it instead of `collect.generate_rollout`, with --loss-type sft_loss.
- Invariant: every response token counts in the loss, including the end-of-sequence token; no prompt token does.
"""

from __future__ import annotations

import logging
import statistics

from slime.config.args import Args
from slime.config.context import context_length
from slime.config.problem import show
from slime.core.sample import Sample, Status
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.metrics import sample_metrics
from slime.rollout.tokenizer import tokenize

logger = logging.getLogger(__name__)


async def generate_rollout(
    args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext
) -> RolloutResult:
    """Return `--rollout-batch-size` groups whose responses are the texts under --label-key.

    An example that does not fit into the context is left out and counted, and the next one replaces it.

    Raises:
        ValueError: there are no labels, or no example fits.
    """
    if args.label_key is None:
        raise ValueError("--label-key: not given; under supervised training it names the response in a data line")
    limit = context_length(args)
    groups: list[list[Sample]] = []
    num_too_long = 0
    while len(groups) < args.rollout_batch_size:
        missing = args.rollout_batch_size - len(groups)
        drawn = data_source.get_groups(missing, rollout_id=rollout_id)
        fill_responses(args, [sample for group in drawn for sample in group], context)
        fitting = [group for group in drawn if limit is None or len(group[0].tokens) <= limit]
        groups += fitting
        num_too_long += len(drawn) - len(fitting)
        if num_too_long >= args.max_empty_waves * args.rollout_batch_size:
            raise ValueError(
                f"--prompt-data {show(args.prompt_data)}: {num_too_long} examples drawn for rollout {rollout_id} are "
                f"longer than the context of {limit} tokens; shorten them, or raise --rollout-max-context-len"
            )
    samples = [sample for group in groups for sample in group]
    metrics: dict[str, float] = {
        **{f"rollout/{name}": value for name, value in sample_metrics(samples).items()},
        "rollout/tokens": sum(sample.response_length for sample in samples),
        "rollout/prompt_length": statistics.fmean(sample.prompt_length for sample in samples),
    }
    if num_too_long:
        metrics["rollout/groups_dropped/too_long"] = num_too_long
    return RolloutResult(groups, metrics)


def fill_responses(args: Args, samples: list[Sample], context: RolloutContext) -> None:
    """Append each sample's response to its prompt: its label, closed by the tokenizer's end-of-sequence token."""
    end = context.tokenizer.eos_token
    if not isinstance(end, str):
        raise ValueError(f"--hf-checkpoint {args.hf_checkpoint}: its tokenizer names no eos_token to end a response")
    texts = [sample.label or "" for sample in samples]
    closed = [text if text.endswith(end) else text + end for text in texts]
    for sample, text, tokens in zip(
        samples, closed, tokenize(context.tokenizer, closed, add_special_tokens=False), strict=True
    ):
        sample.tokens = sample.prompt_tokens + tokens
        sample.response = text
        sample.response_length = len(tokens)
        sample.loss_mask = [1] * len(tokens)
        sample.reward = 0.0
        sample.status = Status.COMPLETED
