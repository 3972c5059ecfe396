"""DataBuffer: supplies prompts, takes back leftovers, and keeps one state that a checkpoint can hold.

- Called by: the rollout function draws groups from here and gives back the groups that it did not need.
- Invariant: an epoch uses every prompt exactly once, or as often as --prompt-data-weights says, also if the run is
  saved and resumed in between. A group that is given back counts as not used, and is drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slime.config.args import Args
from slime.config.context import longest_prompt
from slime.config.data_rows import DataKeys
from slime.config.epochs import prompt_weights, prompts_of_epoch
from slime.config.resuming import SHA256, SHA256_OF_OTHERS
from slime.core.plugins import hook_function
from slime.core.sample import Sample
from slime.core.sample_columns import from_columns, to_columns
from slime.rollout.epoch_order import epoch_order
from slime.rollout.filter_hub.buffer_filters import pop_first
from slime.rollout.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataBuffer:
    """Groups of `--n-samples-per-prompt` samples, with their prompts tokenized.

    Raises:
        ValueError: --prompt-data is missing or cannot be read (file and line are named).
    """

    def __init__(self, args: Args, tokenizer: PreTrainedTokenizerBase, *, data: PromptSet | None = None) -> None:
        """Load the prompts, or take `data`, which are loaded already."""
        self._args = args
        self._data = _load(args, tokenizer) if data is None else data
        path = args.buffer_filter_path
        self._filter = pop_first if path is None else hook_function("buffer_filter_path", path)
        self._buffer: list[list[Sample]] = []
        self._epoch = 0
        self._cursor = 0
        self._next_group_index = 0
        self._next_index = 0
        self._order = self._epoch_order()

    @property
    def num_prompts(self) -> int:
        """The number of prompts in one epoch, rounded up; a prompt that leaves no room to answer does not count."""
        return prompts_of_epoch(self._args, self._data.sizes)

    @property
    def mean_prompt_tokens(self) -> float | None:
        """The mean tokens in a prompt; None if there are no prompts, or only conversations to learn from."""
        prompts = self._data.prompts
        return sum(len(prompt.tokens) for prompt in prompts) / len(prompts) or None if prompts else None

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        """Return `num` groups: first those that the buffer filter takes from the buffer, then new prompts.

        Raises:
            ValueError: the buffer filter returned more groups than were asked for, or left one in the buffer.
        """
        groups: list[list[Sample]] = []
        if self._buffer and num > 0:
            groups = self._filter(self._args, rollout_id, self._buffer, num)
            if len(groups) > num:
                raise ValueError(
                    f"--buffer-filter-path {self._args.buffer_filter_path}: it returned {len(groups)} groups "
                    f"where num_samples was {num}; it may return fewer, never more"
                )
            if {id(group) for group in groups} & {id(group) for group in self._buffer}:
                raise ValueError(
                    f"--buffer-filter-path {self._args.buffer_filter_path}: it returned a group that still is in the "
                    "buffer, and would be trained on twice; it has to take out what it returns"
                )
        return [*groups, *(self._new_group() for _ in range(num - len(groups)))]

    def add_groups(self, groups: Sequence[list[Sample]]) -> None:
        """Give groups back; they are handed out before new prompts."""
        self._buffer.extend(groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types and, for the samples, arrays (`core.sample_columns`)."""
        return {
            "data": self._fingerprint(),
            "epoch": self._epoch,
            "cursor": self._cursor,
            "next_group_index": self._next_group_index,
            "next_index": self._next_index,
            "buffer": to_columns(self._buffer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: `state` was taken with other data, or with another order of the same data.
        """
        saved, here = state["data"], self._fingerprint()
        optional = {SHA256_OF_OTHERS: here[SHA256_OF_OTHERS], "--prompt-data-weights": None}
        saved = optional | saved  # older checkpoints do not have these
        changed = [f"{name}: {saved.get(name)!r} then, {value!r} now" for name, value in here.items()
                   if saved.get(name) != value]  # fmt: skip
        if changed:
            raise ValueError(
                f"--prompt-data {self._data.path}: not what the checkpoint was made with, so its place in the "
                f"data means nothing here ({'; '.join(changed)}); restore the files and flags, or start a new --save"
            )
        self._buffer = from_columns(state["buffer"])
        self._epoch = state["epoch"]
        self._cursor = state["cursor"]
        self._next_group_index = state["next_group_index"]
        self._next_index = state["next_index"]
        self._order = self._epoch_order()

    def _fingerprint(self) -> dict[str, Any]:
        """Return all that decides which prompt a cursor means. The path is no part of it, because a file may move."""
        args = self._args
        return {
            SHA256: self._data.sha256,
            SHA256_OF_OTHERS: self._data.sha256_of_others,
            "number of prompts": len(self._data.prompts),
            "--prompt-data-weights": self._weights(),
            "--rollout-shuffle": args.rollout_shuffle,
            "--rollout-seed": args.rollout_seed,
            "--n-samples-per-prompt": args.resolved.n_samples_per_prompt,
        }

    def _epoch_order(self) -> list[int]:
        args = self._args
        seed = args.rollout_seed if args.rollout_shuffle else None
        sizes = self._data.sizes
        return epoch_order(sizes, prompt_weights(args, len(sizes)), epoch=self._epoch, seed=seed)

    def _weights(self) -> list[list[float]] | None:
        """Return the weights with the number of prompts that each is for, as JSON types; None if there are none."""
        weights = self._args.prompt_data_weights
        return [[weight, size] for weight, size in zip(weights, self._data.sizes, strict=True)] if weights else None

    def _new_group(self) -> list[Sample]:
        while self._cursor == len(self._order):  # with small weights, an epoch may be empty
            self._epoch += 1
            self._cursor = 0
            self._order = self._epoch_order()
        prompt = self._data.prompts[self._order[self._cursor]]
        self._cursor += 1
        group = [
            prompt.to_sample(group_index=self._next_group_index, index=self._next_index + offset)
            for offset in range(self._args.resolved.n_samples_per_prompt)
        ]
        self._next_group_index += 1
        self._next_index += len(group)
        return group


def _load(args: Args, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    if args.prompt_data is None:
        raise ValueError("--prompt-data: not given, and the rollout needs prompts; name a jsonl or parquet file")
    keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
    return load_prompts(args.prompt_data, args, tokenizer, keys, longest=longest_prompt(args))
