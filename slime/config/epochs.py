"""--num-epoch: how many rollouts it comes to.

Path: the plan and the rules ask with the rows of the data file, the cluster with the prompts that were kept, before a
trainer starts. Invariant: every prompt is drawn at least --num-epoch times. (The last rollout goes on into the next
epoch; groups that a dynamic filter drops have been drawn, too, and bring the next epoch nearer. What over-sampling has
drawn beyond the last rollout's need stays in the Data Buffer, untrained.)
"""

from __future__ import annotations

from slime.config.args import Args
from slime.config.data_files import count_rows, split_slice
from slime.config.flags.options import HookOptions
from slime.core.small_files import is_file


def rollouts_of_epochs(args: Args, num_prompts: int) -> int:
    """--num-epoch x prompts / --rollout-batch-size, rounded up."""
    assert args.num_epoch is not None, "the rules ask for one of --num-rollout and --num-epoch"
    return -(-args.num_epoch * num_prompts // args.rollout_batch_size)


def planned_prompts(args: Args) -> int | None:
    """Rows of --prompt-data; those that are too long are found only when they are tokenised.

    None where there is nothing to count: a data source of the user's own, or no readable file on this machine.
    """
    if args.data_source_path != HookOptions.data_source_path or args.prompt_data is None:
        return None
    try:
        file, _ = split_slice(args.prompt_data)
        return count_rows(args.prompt_data) if is_file(file) else None
    except ValueError:
        return None  # another rule's error


def planned_rollouts(args: Args) -> int | None:
    """--num-rollout, or what --num-epoch comes to at most; None where it cannot be told yet."""
    if args.num_epoch is None or args.num_rollout is not None:
        return args.num_rollout
    num_prompts = planned_prompts(args)
    return None if num_prompts is None else rollouts_of_epochs(args, num_prompts)
