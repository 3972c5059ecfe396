"""Inputs and outputs of the rollout, generate and evaluation functions.

- Used by: the rollout manager makes one context for the whole run. Every call of a rollout, generate or evaluation
  function, built in or a user's, receives it.
- Invariant: the context holds no state of a rollout, so calls do not depend on each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from slime.config.args import Args
from slime.config.end_tokens import END_OF_MESSAGE, end_token_ids
from slime.core.sample import Sample
from slime.engine.client import EngineClient
from slime.rollout.progress import ProgressBoard
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
LARGE_VOCABULARY = 10_000
"""Tokens of a vocabulary from which reading its table takes tenths of a second."""


class DataSource(Protocol):
    """The interface that a class of --data-source-path has to provide."""

    @property
    def num_prompts(self) -> int:
        """The number of prompts in one epoch, for --num-epoch."""
        ...

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]: ...

    def add_groups(self, groups: Sequence[list[Sample]]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class RolloutContext:
    """The tools of rollout, evaluation and generate functions. `client` is None if no engine runs (SFT)."""

    args: Args
    client: EngineClient | None
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardPool
    policy_version: int = 0
    progress: ProgressBoard = field(default_factory=ProgressBoard)
    """Shows the console how far calls are; a rollout function of a user's may put up its own count, or none."""

    @property
    def engines(self) -> EngineClient:
        """The client of the engines.

        Raises:
            ValueError: there are no engines.
        """
        if self.client is None:
            raise ValueError("--rollout-num-gpus 0: nothing can be generated without engines; give it a number > 0")
        return self.client

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens at which an engine ends a response by itself, as the model and its tokenizer name them."""
        own = (self.tokenizer.eos_token_id, self.tokenizer.get_vocab().get(END_OF_MESSAGE))
        ids = frozenset(number for number in own if isinstance(number, int))
        return ids if self.args.hf_checkpoint is None else ids | end_token_ids(self.args.hf_checkpoint)

    @cached_property
    def token_text(self) -> TokenText:
        """The tokens as text: what the tokenizer's `decode` returns, in a twentieth of the time if it is byte-level."""
        return TokenText(self.tokenizer)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens, exactly as the tokenizer decodes them."""
        return self.token_text.decode(tokens, skip_special_tokens=skip_special_tokens)


@dataclass(frozen=True)
class RolloutResult:
    """The kept groups, in the order of their group_index, and the metrics of the rollout."""

    groups: list[list[Sample]]
    metrics: dict[str, float]


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; if one raises, or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def request_slots(args: Args, context: RolloutContext) -> asyncio.Semaphore:
    """Return a semaphore with one slot for each request that the engines take at once.

    What the first answers need is prepared as well, in a thread if the vocabulary is so large that it takes long.
    """
    if len(context.tokenizer) > LARGE_VOCABULARY:
        await asyncio.to_thread(lambda: context.token_text)
    engines = await context.engines.workers()
    return asyncio.Semaphore(args.sglang_server_concurrency * max(1, len(engines)))
