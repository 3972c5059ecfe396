"""The evaluation sets of supervised fine-tuning: examples whose loss the trainers compute, without engines.

- Called by: the data side, once; every evaluation takes the same rows.
- Invariant: the rows are made by the functions that make those of training, so both losses mean the same.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from slime.config.args import Args
from slime.config.context import context_length
from slime.config.eval_data import EvalDataset, eval_datasets
from slime.config.problem import show
from slime.config.prompt_format import PromptFormat
from slime.core.batch import TrainBatch, from_samples
from slime.rollout.prompts import load_prompts
from slime.rollout.sft_rollout import fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def validation_sets(args: Args, tokenizer: PreTrainedTokenizerBase) -> dict[str, TrainBatch]:
    """Return the rows of each evaluation set by its name. An example longer than the context is left out.

    Raises:
        ValueError: a file cannot be read, a row cannot be used, or no example of a set fits.
    """
    return {dataset.name: _rows(args, dataset, tokenizer) for dataset in eval_datasets(args)}


def _rows(args: Args, dataset: EvalDataset, tokenizer: PreTrainedTokenizerBase) -> TrainBatch:
    limit, form = context_length(args), PromptFormat.of(dataset)
    longest = None if limit is None else limit - 1
    data = load_prompts(dataset.path, args, tokenizer, dataset.keys, longest=longest, form=form)
    samples = [prompt.to_sample(group_index=number, index=number) for number, prompt in enumerate(data.prompts)]
    fill(samples, tokenizer, dataset.keys, form)
    fitting = [sample for sample in samples if limit is None or sample.num_tokens <= limit]
    where = f"evaluation set {dataset.name} ({show(dataset.path)})"
    if not fitting:
        raise ValueError(f"{where}: no example fits into the context of {limit} tokens; shorten them, or raise it")
    if len(fitting) < len(samples):
        logger.warning(
            "%s: %d of %d examples left out: they are longer than the context of %d tokens",
            where,
            len(samples) - len(fitting),
            len(samples),
            limit,
        )
    return from_samples(fitting)
