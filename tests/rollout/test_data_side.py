"""The data side under random schedules: nothing is lost or repeated, and every token is accounted for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from scripted_engine import ScriptedEngine, check_drawn, reward_of
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.in_flight import TrackedSource
from slime.rollout.reward_pool.pool import RewardPool
from tests.saved_state import as_json

Write = Callable[..., str]
NUM_PROMPTS = 7
ACTIONS = [
    *["start"] * 5, *["answer"] * 8, *["finish"] * 3, *["update"] * 3, *["train"] * 5, *["save"] * 2, "kill"
]  # fmt: skip
"""The actions, in proportions that keep rollouts running for a while."""
MODES = (
    {},
    {"partial_rollout": True},
    {"partial_rollout": True, "max_staleness": 1},
    {"partial_rollout": True, "partial_rollout_max_tokens": 3},
    {"deterministic": True},
    {"deterministic": True, "partial_rollout": True, "partial_rollout_max_tokens": 3},
    {"rollouts_ahead": 1, "partial_rollout": True, "refill_granularity": "group"},
)


def data_args(path: str, **kwargs: Any) -> Args:
    defaults: dict[str, Any] = {
        "prompt_data": path,
        "label_key": "label",
        "rollout_shuffle": True,
        "rollout_batch_size": 2,
        "over_sampling_batch_size": 4,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 10,
        "max_empty_waves": 10_000,
        "custom_generate_function_path": "scripted_engine.generate_and_judge",
        "dynamic_sampling_filter_path": "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        "custom_rm_path": "rewards_for_tests.coin",  # never called: the generate function judges
    }
    return Args(**{**defaults, **kwargs})


class Side:
    """The parts of a rollout manager, with one rollout after another; a training step consumes what was made."""

    def __init__(
        self, args: Args, tokenizer: PreTrainedTokenizerFast, source: Callable[[DataBuffer], TrackedSource]
    ) -> None:
        self.args = args
        self.engine = ScriptedEngine()
        self.source = source(DataBuffer(args, tokenizer))
        self.context = RolloutContext(args, self.engine, tokenizer, RewardPool(args), self.engine.version)  # pyright: ignore[reportArgumentType]
        self.task: asyncio.Task[RolloutResult] | None = None
        self.made: RolloutResult | None = None
        self.next_rollout = 0
        self.num_trained = 0
        self.trained: list[int] = []
        """The group_index of every group that was trained on."""
        self.num_dropped = 0
        """Groups dropped by the filter, by the metrics of the rollouts that were trained on."""

    def start(self) -> None:
        work = generate_rollout(self.args, self.next_rollout, self.source, self.context)
        self.task = asyncio.get_running_loop().create_task(work)
        self.next_rollout += 1

    def look(self) -> None:
        if self.task is not None and self.task.done():
            self.made, self.task = self.task.result(), None

    def train(self) -> RolloutResult:
        result, self.made = self.made, None
        assert result is not None
        self.trained += [group[0].group_index for group in result.groups]
        self.num_dropped += int(sum(v for k, v in result.metrics.items() if k.startswith("rollout/groups_dropped/")))
        self.source.forget(self.num_trained)
        self.num_trained += 1
        return result

    def state(self) -> dict[str, Any]:
        """Return a checkpoint's state, with the trainer's side of the account."""
        whole = {
            "source": self.source.state_dict(),
            "version": self.engine.version,
            "num_trained": self.num_trained,
            "trained": self.trained,
            "num_dropped": self.num_dropped,
        }
        return as_json(whole)

    def load(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.engine.version = self.context.policy_version = state["version"]
        self.next_rollout = self.num_trained = state["num_trained"]
        self.trained, self.num_dropped = list(state["trained"]), state["num_dropped"]


async def settle() -> None:
    """Let everything run that can continue."""
    for _ in range(40):
        await asyncio.sleep(0)


def check_account(state: dict[str, Any]) -> None:
    """Check that every group ever drawn is trained on, in flight, in the buffer, or was dropped and counted."""
    source = state["source"]["source"]
    places = {
        "trained": state["trained"],
        "in flight": [group[0]["group_index"] for group in state["source"]["in_flight"]],
        "buffer": [group[0]["group_index"] for group in source["buffer"]],
    }
    everywhere = Counter(index for indices in places.values() for index in indices)
    assert max(everywhere.values(), default=1) == 1, f"a group in two places: {places}"
    num_drawn = source["next_group_index"]
    assert all(0 <= index < num_drawn for index in everywhere)
    assert len(everywhere) + state["num_dropped"] == num_drawn, f"of {num_drawn} groups drawn: {places}"
    assert num_drawn == source["epoch"] * NUM_PROMPTS + source["cursor"]


class DataSide(RuleBasedStateMachine):
    """The state machine; subclasses name the data file, the tokenizer and the source."""

    path: str
    tokenizer: PreTrainedTokenizerFast
    make_source: Callable[[DataBuffer], TrackedSource] = TrackedSource
    reached: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.prompts: dict[int, str] = {}

    def run(self, work: Callable[[], object] = lambda: None) -> None:
        async def main() -> None:
            work()
            await settle()
            self.side.look()

        self.loop.run_until_complete(main())

    def make(self) -> Side:
        return Side(self.args, self.tokenizer, type(self).make_source)

    @initialize(mode=st.sampled_from(MODES))
    def begin(self, mode: dict[str, Any]) -> None:
        self.args = data_args(self.path, **mode)
        self.side = self.make()
        self.saved = self.side.state()

    @rule(action=st.sampled_from(ACTIONS), place=st.integers(0, 50), num_tokens=st.integers(1, 10))
    def step(self, action: str, place: int, num_tokens: int) -> None:
        """Do the action if it is possible now."""
        side = self.side
        if action == "start" and side.task is None and side.made is None:
            self.run(side.start)
        elif action == "answer" and side.engine.in_flight:
            self.answer(place, num_tokens)
        elif action == "finish" and side.task is not None:
            self.finish_rollout(place)
        elif action == "update" and not (self.args.deterministic and side.task is not None):
            self.update_weights()
        elif action == "train" and side.made is not None:
            self.train()
        elif action == "save":
            self.save()
        elif action == "kill":
            self.kill_and_restore()

    def answer(self, place: int, num_tokens: int) -> None:
        engine = self.side.engine
        self.run(lambda: engine.advance(place % len(engine.in_flight), num_tokens))

    def finish_rollout(self, seed: int) -> None:
        """Answer in a random order until the rollout is whole."""
        order = random.Random(seed)
        while self.side.task is not None:
            assert self.side.engine.in_flight, "a rollout that waits for nothing"
            self.answer(order.randrange(50), order.randint(1, 10))

    def update_weights(self) -> None:
        """Update weights, also while requests are in flight: they are aborted, and continue with the new weights."""
        self.reached["update while requests are in flight"] += bool(self.side.engine.in_flight)

        async def update() -> None:
            await self.side.engine.update_weights()
            self.side.context.policy_version = self.side.engine.version
            await settle()
            self.side.look()

        self.loop.run_until_complete(update())

    def train(self) -> None:
        result = self.side.train()
        assert len(result.groups) == self.args.rollout_batch_size
        for group in result.groups:
            assert len(group) == self.args.n_samples_per_prompt
            for sample in group:
                assert sample.is_finished
                assert sample.reward == reward_of(sample)
                check_drawn(self.args, sample)
            assert len({sample.metadata["start_rollout_id"] for sample in group}) == 1
            started = group[0].metadata["start_rollout_id"]
            assert self.args.partial_rollout or started == self.side.num_trained - 1
            self.reached["trained on what began earlier"] += started < self.side.num_trained - 1
            self.reached["two policies in a sample"] += any(len(set(s.policy_versions or ())) > 1 for s in group)
        self.reached["dropped"] += self.side.num_dropped

    def save(self) -> None:
        self.saved = self.side.state()
        self.reached["saved in flight"] += bool(self.saved["source"]["in_flight"])

    def kill_and_restore(self) -> None:
        self.kill()
        self.side = self.make()
        self.side.load(self.saved)

    def kill(self) -> None:
        if self.side.task is not None:
            self.side.task.cancel()
            self.loop.run_until_complete(asyncio.wait([self.side.task]))

    @invariant()
    def nothing_is_lost_or_repeated(self) -> None:
        state = self.side.state()
        check_account(state)
        for group in [*state["source"]["in_flight"], *state["source"]["source"]["buffer"]]:
            self.check_waiting([Sample.from_dict(sample) for sample in group])

    def check_waiting(self, group: Sequence[Sample]) -> None:
        """A prompt keeps its number through aborts, saves and restores, and its kept tokens stay as sampled."""
        index = group[0].group_index
        assert [sample.index for sample in group] == [2 * index, 2 * index + 1]
        for sample in group:
            prompt = self.prompts.setdefault(index, str(sample.prompt))
            assert sample.prompt == prompt
            if sample.response_length:
                check_drawn(self.args, sample)

    def teardown(self) -> None:
        if hasattr(self, "side"):
            self.kill()
        self.loop.close()


def machine(path: str, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> type[DataSide]:
    return type("Machine", (DataSide,), {"path": path, "tokenizer": tokenizer, "reached": Counter(), **kwargs})


@pytest.fixture
def prompts(data_file: Write, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("slime.rollout.group._FRUITLESS_PAUSE", 0)
    yield data_file([{"prompt": f"question {number}", "label": str(number)} for number in range(NUM_PROMPTS)])


def small(**kwargs: Any) -> settings:
    return settings(
        derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=60, **kwargs
    )


def test_no_prompt_is_lost_and_none_repeated(prompts: str, tokenizer: PreTrainedTokenizerFast) -> None:
    side = machine(prompts, tokenizer)
    run_state_machine_as_test(side, settings=small(max_examples=settings.default.max_examples * 3 // 10))
    wanted = ("update while requests are in flight", "trained on what began earlier", "two policies in a sample")
    for what in (*wanted, "dropped", "saved in flight"):
        assert side.reached[what] > 0, f"the schedules never reach: {what}"


class LosesOne(TrackedSource):
    """A data source that loses one of many groups that are given back."""

    def add_groups(self, groups: Sequence[list[Sample]]) -> None:
        super().add_groups(groups)
        if len(groups) > 1:
            self._source._buffer.pop()  # pyright: ignore[reportAttributeAccessIssue]


class ForgetsWhatIsInFlight(TrackedSource):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "in_flight": []}


class HandsOutTwice(TrackedSource):
    """A source whose restored groups are handed out, and stay in the list."""

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        restored = list(self._restored)
        groups = super().get_groups(num, rollout_id=rollout_id)
        self._restored = restored
        return groups


@pytest.mark.parametrize("source", [LosesOne, ForgetsWhatIsInFlight, HandsOutTwice])
def test_a_source_that_is_wrong_is_noticed(
    prompts: str, tokenizer: PreTrainedTokenizerFast, source: type[TrackedSource]
) -> None:
    """Control: each broken source is noticed."""
    side = machine(prompts, tokenizer, make_source=source)
    with pytest.raises(AssertionError, match=r"of \d+ groups drawn|a group in two places"):
        run_state_machine_as_test(side, settings=small(max_examples=40, phases=[Phase.generate]))


# --- the order of submission ------------------------------------------------------------------------------------


def eight_rollouts(args: Args, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Return samples and metrics (without times) of eight rollouts, and the state; `seed` decides who is fast."""

    async def main() -> tuple[list[Any], dict[str, Any]]:
        side, order, seen = Side(args, tokenizer, TrackedSource), random.Random(seed), []
        for _ in range(8):
            side.start()
            await settle()
            side.look()
            while side.task is not None:
                side.engine.advance(order.randrange(len(side.engine.in_flight)), order.randint(1, 10))
                await settle()
                side.look()
            result = side.train()
            samples = [sample.to_dict() for group in result.groups for sample in group]
            timed = ("time/", "rollout/tokens_per_second")
            seen.append((samples, {k: v for k, v in result.metrics.items() if not k.startswith(timed)}))
            await side.engine.update_weights()
            side.context.policy_version = side.engine.version
        return seen, side.state()

    return asyncio.run(main())


@pytest.mark.parametrize("granularity", ["batch", "group"])
@pytest.mark.parametrize("partial", [{}, {"partial_rollout": True, "partial_rollout_max_tokens": 3}])
def test_speed_decides_nothing_with_deterministic(
    prompts: str, tokenizer: PreTrainedTokenizerFast, partial: dict[str, Any], granularity: str
) -> None:
    args = data_args(prompts, deterministic=True, over_sampling_batch_size=8, refill_granularity=granularity, **partial)
    first = eight_rollouts(args, tokenizer, seed=0)
    assert all(eight_rollouts(args, tokenizer, seed) == first for seed in range(1, 4))
    if partial:
        assert sum(metrics["rollout/partial_groups"] for _, metrics in first[0]) > 0
        assert any(len(set(sample["policy_versions"])) > 1 for samples, _ in first[0] for sample in samples)


def test_speed_decides_without_deterministic(prompts: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Control: without --deterministic the order shows."""
    args = data_args(prompts)
    assert eight_rollouts(args, tokenizer, 0) != eight_rollouts(args, tokenizer, 1)
