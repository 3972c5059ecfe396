"""The rollout for supervised fine-tuning: responses come from the data, and no engine is used.

- Where it sits: --rollout-function-path chooses it instead of `collect.generate_rollout`, with --loss-type sft_loss.
  `validation_sets` makes the rows of its evaluation sets with the same functions.
- Invariant: a token counts in the loss if it is a part of a response, or of an assistant's message that is trained on,
  with the token that ends it. No other token does.

A conversation becomes one row. Its prompt ends before the first trained token, and its response ends with the last one;
the mask is 0 on what lies between, as in a rollout of several turns:

    <user> 2+2? <assistant> 4 <end> <user> 3+3? <assistant> 6 <end>
    |------- prompt -------|1   1     0     0        0      1   1  |
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slime.config.args import Args
from slime.config.context import context_length
from slime.config.data_rows import DataKeys
from slime.config.messages import WEIGHT_KEY
from slime.config.problem import show
from slime.config.prompt_format import PromptFormat
from slime.core.sample import Sample, Status
from slime.rollout.chat_template import conversation_tokens, render_conversation
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.metrics import sample_metrics
from slime.rollout.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


async def generate_rollout(
    args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext
) -> RolloutResult:
    """Return `--rollout-batch-size` groups whose responses are texts under --label-key, or the assistant's messages.

    An example that does not fit into the context is left out and counted, and the next one replaces it.

    Raises:
        ValueError: there are no responses, or no example fits.
    """
    limit = context_length(args)
    groups: list[list[Sample]] = []
    num_too_long = 0
    while len(groups) < args.rollout_batch_size:
        missing = args.rollout_batch_size - len(groups)
        drawn = data_source.get_groups(missing, rollout_id=rollout_id)
        fill_responses(args, [sample for group in drawn for sample in group], context)
        fitting = [group for group in drawn if limit is None or group[0].num_tokens <= limit]
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
        "rollout/trained_tokens": sum(map(num_trained, samples)),
        "rollout/prompt_length": statistics.fmean(sample.prompt_length for sample in samples),
    }
    if num_too_long:
        metrics["rollout/groups_dropped/too_long"] = num_too_long
    return RolloutResult(groups, metrics)


def num_trained(sample: Sample) -> int:
    """Return the number of tokens that count in the loss."""
    mask_R = sample.array("loss_mask")
    return sample.response_length if mask_R is None else int(np.count_nonzero(mask_R > 0))


def fill_responses(args: Args, samples: list[Sample], context: RolloutContext) -> None:
    """Give each sample of the training data its response (see `fill`)."""
    keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
    fill(samples, context.tokenizer, keys, PromptFormat.of(args))


def fill(samples: list[Sample], tokenizer: PreTrainedTokenizerBase, keys: DataKeys, form: PromptFormat) -> None:
    """Give each sample its response: its label after its prompt, or the assistant's messages of its conversation.

    Raises:
        ValueError: a sample has no response, or it cannot be told which tokens of a conversation are the assistant's.
    """
    labelled = [sample for sample in samples if sample.label is not None]
    _append_labels(labelled, tokenizer)
    for sample in samples:
        if sample.label is None:
            _read_conversation(sample, tokenizer, keys, form)
        sample.reward = 0.0
        sample.status = Status.COMPLETED


def _append_labels(samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
    """Append each sample's label to its prompt, closed by the tokenizer's end-of-sequence token."""
    end = tokenizer.eos_token
    if samples and not isinstance(end, str):
        where = f"--hf-checkpoint {tokenizer.name_or_path}"
        raise ValueError(f"{where}: its tokenizer names no eos_token to end a response")
    texts = [sample.label or "" for sample in samples]
    closed = [text if text.endswith(str(end)) else f"{text}{end}" for text in texts]
    for sample, text, tokens in zip(
        samples, closed, tokenize(tokenizer, closed, add_special_tokens=False), strict=True
    ):
        sample.tokens = sample.prompt_tokens + tokens
        sample.response = text
        sample.response_length = len(tokens)
        sample.loss_mask = [1] * len(tokens)


def _read_conversation(sample: Sample, tokenizer: PreTrainedTokenizerBase, keys: DataKeys, form: PromptFormat) -> None:
    """Tokenize a sample's conversation; its mask has the weight of the message that a token belongs to."""
    messages = sample.prompt
    where = f"the data row of sample {sample.index} (group {sample.group_index})"
    if isinstance(messages, str) or not any(message.get(WEIGHT_KEY) for message in messages):
        raise ValueError(
            f"{where}: it has neither a label nor a message of the assistant with a weight above 0, so there is "
            "nothing to learn; name the response with --label-key, or give messages"
        )
    try:
        tools = keys.tools(sample.row)
        conversation = render_conversation(tokenizer, messages, tools, form.template_kwargs, answers_only=True)
        found = conversation_tokens(tokenizer, conversation)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    mask_T = [messages[number].get(WEIGHT_KEY, 0) if number >= 0 else 0 for number in found.message_T]
    mask_T[0] = 0  # nothing predicts the first token of a text
    first, end = _trained_range(mask_T)
    if first == end:
        raise ValueError(f"{where}: the chat template gives its trained messages no tokens")
    sample.tokens = found.ids[:end]
    sample.prompt_length, sample.response_length = first, end - first
    sample.loss_mask = mask_T[first:end]
    text = tokenizer.decode(found.ids[first:end], skip_special_tokens=False)
    assert isinstance(text, str)
    sample.response = text


def _trained_range(mask_T: Sequence[float]) -> tuple[int, int]:
    """Return the first trained token and the one after the last; an empty range if there is none."""
    places = [place for place, weight in enumerate(mask_T) if weight]
    return (places[0], places[-1] + 1) if places else (0, 0)
