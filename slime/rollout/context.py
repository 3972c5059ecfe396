"""What the functions that make samples are given, and what they give back.

Path: the rollout manager makes one context for the run; rollout, generate and evaluation functions, built in or a
user's, get it with every call. Invariant: it holds no state of a rollout, so that calls do not depend on each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from slime.config.args import Args
from slime.config.end_tokens import END_OF_MESSAGE, end_token_ids
from slime.core.sample import Sample
from slime.engine.client import EngineClient
from slime.rollout.rm_hub import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class DataSource(Protocol):
    """What --data-source-path has to be."""

    @property
    def num_prompts(self) -> int:
        """Prompts of one epoch, for --num-epoch."""
        ...

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]: ...

    def add_groups(self, groups: Sequence[list[Sample]]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class RolloutContext:
    """What rollout, evaluation and generate functions work with. `client` is None where no engine runs (SFT)."""

    args: Args
    client: EngineClient | None
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardPool
    policy_version: int = 0

    @property
    def engines(self) -> EngineClient:
        """The client.

        Raises:
            ValueError: there are no engines.
        """
        if self.client is None:
            raise ValueError("--rollout-num-gpus 0: nothing can be generated without engines; give it a number > 0")
        return self.client

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens at which an engine ends a response by itself: those that the model and its tokenizer name."""
        own = (self.tokenizer.eos_token_id, self.tokenizer.get_vocab().get(END_OF_MESSAGE))
        ids = frozenset(number for number in own if isinstance(number, int))
        return ids if self.args.hf_checkpoint is None else ids | end_token_ids(self.args.hf_checkpoint)

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


@dataclass(frozen=True)
class RolloutResult:
    """Kept groups in the order of their group_index, and the rollout's metrics."""

    groups: list[list[Sample]]
    metrics: dict[str, float]


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; where one raises, or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def request_slots(args: Args, context: RolloutContext) -> asyncio.Semaphore:
    """As many requests at once as the engines take."""
    engines = await context.engines.workers()
    return asyncio.Semaphore(args.sglang_server_concurrency * max(1, len(engines)))
