"""The number of rollouts that --num-epoch means.

- Used by: the plan and the rules, with the rows of the data file, and the cluster, with the prompts that were kept,
  before a trainer starts.
- Invariant: every prompt is drawn at least --num-epoch times.

With --prompt-data-weights, an epoch has each prompt as often as its weight says (`rollout.epoch_order`).

The last rollout continues into the next epoch. Groups that a dynamic filter drops count as drawn. Groups that
over-sampling draws and the last rollout does not need stay in the data buffer and are not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from slime.config.args import Args
from slime.config.data_files import count_rows, split_slice
from slime.config.data_paths import data_paths, data_words
from slime.core.small_files import is_file


def rollouts_of_epochs(args: Args, num_prompts: int) -> int:
    """Return --num-epoch x prompts / --rollout-batch-size, rounded up."""
    return -(-args.resolved.num_epoch * num_prompts // args.rollout_batch_size)


def prompt_weights(args: Args, num_words: int) -> list[Fraction]:
    """Return how often an epoch has each prompt of each word of --prompt-data; exactly 1/10 for 0.1."""
    return [Fraction(str(weight)) for weight in args.prompt_data_weights or [1] * num_words]


def prompts_of_epoch(args: Args, sizes: Sequence[int]) -> int:
    """Return the number of prompts in one epoch, rounded up; `sizes` are those of the words of --prompt-data."""
    return math.ceil(sum(weight * size for weight, size in zip(prompt_weights(args, len(sizes)), sizes, strict=True)))


def planned_prompts(args: Args) -> int | None:
    """Return the number of rows in one epoch, including prompts that will be too long once they are tokenized.

    None if there is nothing to count: the user has their own data source, or the file is not readable on this machine.
    """
    if args.has_own_data_source or args.prompt_data is None:
        return None
    try:
        words = [data_paths(word) for word in data_words(args.prompt_data)]
        there = all(is_file(split_slice(path)[0]) for paths in words for path in paths)
        return prompts_of_epoch(args, [sum(map(count_rows, paths)) for paths in words]) if there else None
    except ValueError:
        return None  # another rule's error


def planned_rollouts(args: Args) -> int | None:
    """Return --num-rollout, or the largest number of rollouts for --num-epoch; None if it is not known yet."""
    if args.num_epoch is None or args.num_rollout is not None:
        return args.num_rollout
    num_prompts = planned_prompts(args)
    return None if num_prompts is None else rollouts_of_epochs(args, num_prompts)
