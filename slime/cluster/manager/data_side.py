"""DataSide: the data of the rollout manager, from prompts over rewards to the training batch.

- Used by: the rollout manager, which makes it in its first call and passes it the engines for each rollout.
- Invariant: its `state_dict` is the whole data side of a checkpoint, also while a rollout is generated and while a
  whole rollout waits for the loop to take it.
"""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slime.cluster.manager.abortable import Abortable
from slime.cluster.manager.engine_side import NoEngines
from slime.config.args import Args
from slime.core.batch import TrainBatch, from_samples
from slime.core.plugins import hook_errors, hook_function, load_hook
from slime.core.sample import Sample
from slime.core.sample_columns import from_columns, to_columns
from slime.observability.samples_file import SAMPLES
from slime.rollout.acceptance import mask_truncated
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.dump import read_replay, write_dump
from slime.rollout.evaluate import Evaluator
from slime.rollout.generate import sampling_record
from slime.rollout.in_flight import TrackedSource
from slime.rollout.metrics import replay_metrics
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.sample_log import SampleLog
from slime.rollout.tokenizer import load_tokenizer
from slime.rollout.validation_sets import validation_sets

LARGE = 1_000_000
"""Tokens of a rollout whose batch is made in a thread: numpy copies without Python's lock, and the loop goes on."""


@dataclass
class _Made:
    """A whole rollout with samples of its own, so later changes to the loop's samples do not show in it."""

    rollout_id: int
    groups: list[list[Sample]]
    metrics: dict[str, float]

    @classmethod
    def of(cls, rollout_id: int, groups: list[list[Sample]], metrics: dict[str, float]) -> _Made:
        lasting = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        return cls(rollout_id, _copies(groups), lasting)

    def result(self) -> RolloutResult:
        return RolloutResult(_copies(self.groups), dict(self.metrics))

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_id": self.rollout_id, "groups": to_columns(self.groups), "metrics": dict(self.metrics)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Made:
        return cls(state["rollout_id"], from_columns(state["groups"]), state["metrics"])


def _copies(groups: list[list[Sample]]) -> list[list[Sample]]:
    return [[sample.copy() for sample in group] for group in groups]


class DataSide:
    """Tokenizer, prompts, hooks and reward workers of a run, with the state that its checkpoints hold."""

    def __init__(self, args: Args, log_dir: Path) -> None:
        """Load all of it. Raises ValueError if a file or a hook cannot be used."""
        self._args = args
        self._log_dir = log_dir
        tokenizer = load_tokenizer(args)
        self._source: TrackedSource | None = None
        self.mean_prompt_tokens: float | None = None
        """The mean tokens in a training prompt; None if it is not known."""
        if args.prompt_data is not None or args.has_own_data_source:
            source = load_hook("data_source_path", args.data_source_path)
            with hook_errors("data_source_path", args.data_source_path):
                made = source(args, tokenizer)
                self._source = TrackedSource(made)
            self.mean_prompt_tokens = made.mean_prompt_tokens if isinstance(made, DataBuffer) else None
        self._rollout_function = hook_function("rollout_function_path", args.rollout_function_path)
        self._rewards = RewardPool(args, log_dir)
        self.context = RolloutContext(args=args, client=None, tokenizer=tokenizer, rewards=self._rewards)
        self._samples = SampleLog(log_dir.parent / SAMPLES, args, tokenizer)
        self._made: _Made | None = None
        """The last whole rollout; the loop may still be busy with the one before it."""
        self._whole = -1
        """The last rollout that can no longer be aborted."""
        self._rollout_work, self._evaluation_work = Abortable(), Abortable()

    def num_prompts(self) -> int:
        """Return the number of prompts in one epoch.

        Raises:
            ValueError: the run has no prompts.
        """
        if self._source is None:
            raise ValueError("--num-epoch: there are no prompts to count; add --prompt-data")
        return self._source.num_prompts

    async def generate(self, rollout_id: int, engines: NoEngines) -> tuple[TrainBatch, dict[str, float]]:
        """Make one rollout with `engines`, or read it from a dump; return its training batch and its metrics."""
        args = self._args
        if args.load_debug_rollout_data is not None:
            self._whole = rollout_id
            groups, sampled = read_replay(args, rollout_id)
            metrics = replay_metrics(args, groups)
        else:
            result = await self._make(rollout_id, engines)
            groups, metrics = result.groups, result.metrics
            sampled = sampling_record(args)
        if args.save_debug_rollout_data is not None:
            write_dump(Path(args.save_debug_rollout_data.format(rollout_id=rollout_id)), groups, sampled)
        await self._samples.rollout(rollout_id, groups)
        samples = [sample for group in groups for sample in group]
        if args.custom_rollout_log_function_path is not None:
            log = hook_function("custom_rollout_log_function_path", args.custom_rollout_log_function_path)
            log(args, rollout_id, samples, metrics)
        return await self._to_batch(samples), metrics

    async def _make(self, rollout_id: int, engines: NoEngines) -> RolloutResult:
        """Return the rollout's groups; a resumed run may have them already."""
        if self._made is not None and self._made.rollout_id == rollout_id:
            self._whole = rollout_id
            return self._made.result()
        work = self._rollout_work.run(lambda: self._call_rollout_function(rollout_id))
        return await engines.guarded(work, self.context)

    async def _call_rollout_function(self, rollout_id: int) -> RolloutResult:
        called = self._rollout_function(self._args, rollout_id, self._source, self.context)
        result: RolloutResult = await called if inspect.isawaitable(called) else called
        # No await from here on: an abort finds the rollout either in flight as a whole, or whole.
        self._whole = rollout_id
        if self._args.rollouts_ahead:  # otherwise it is trained on before anything is saved
            self._made = _Made.of(rollout_id, result.groups, result.metrics)
        if self._source is not None:
            self._source.forget(rollout_id)
        return result

    async def abort(self, rollout_id: int) -> bool:
        """Abort the rollout for good; the groups that it has drawn stay in flight, so that they are saved.

        Return False if the rollout is whole, because it was faster. A user's rollout function that is not async cannot
        be aborted.
        """
        await self._rollout_work.abort()
        return self._whole != rollout_id

    async def abort_evaluation(self) -> None:
        """Abort the evaluation that runs."""
        await self._evaluation_work.abort()

    async def _to_batch(self, samples: list[Sample]) -> TrainBatch:
        args = self._args
        mask_truncated(args, samples)
        if args.custom_convert_samples_to_train_data_path is not None:
            path = args.custom_convert_samples_to_train_data_path
            return hook_function("custom_convert_samples_to_train_data_path", path)(args, samples)
        if sum(sample.num_tokens for sample in samples) < LARGE:
            return from_samples(samples, args.reward_key)
        return await asyncio.to_thread(from_samples, samples, args.reward_key)

    async def evaluate(self, rollout_id: int, engines: NoEngines) -> dict[str, float]:
        """Evaluate with `engines` after `rollout_id` rollouts, and return the metrics."""
        work = self._evaluation_work.run(lambda: self._call_eval_function(rollout_id))
        with self._samples.evaluating():
            return await engines.guarded(work, self.context)

    async def _call_eval_function(self, rollout_id: int) -> dict[str, float]:
        path = self._args.eval_function_path
        if path is not None:
            result = hook_function("eval_function_path", path)(self._args, rollout_id, self.context)
            return await result if inspect.isawaitable(result) else result
        return await self._evaluator.run(rollout_id, self.context)

    def validation_sets(self) -> dict[str, TrainBatch]:
        """Return the rows of SFT's evaluation sets, whose loss the trainers compute."""
        return validation_sets(self._args, self.context.tokenizer)

    @cached_property
    def _evaluator(self) -> Evaluator:
        """The evaluation data, loaded by the first evaluation."""
        return Evaluator(self._args, self.context.tokenizer, self._samples)

    def state_dict(self, next_rollout_id: int = 0) -> dict[str, Any]:
        """Return the state as plain JSON types, and arrays in its dicts (`core.sample_columns`).

        With --deterministic, groups in flight are saved as they were drawn: how far they have come depends on the
        clock, and so would the metrics of the rollout when it is made again. `next_rollout_id` is the first rollout
        that has not been trained on; if it is made already, the state holds it.
        """
        made = self._made if self._made is not None and self._made.rollout_id >= next_rollout_id else None
        return {
            "data_source": None if self._source is None else self._source.state_dict(as_drawn=self._args.deterministic),
            "made": None if made is None else made.state_dict(),
            "policy_version": self.context.policy_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state_dict` returned."""
        if self._source is not None and state["data_source"] is not None:
            self._source.load_state_dict(state["data_source"])
        self._made = None if state.get("made") is None else _Made.from_state(state["made"])
        self.context.policy_version = state["policy_version"]

    def close(self) -> None:
        """End the reward workers."""
        self._rewards.close()
