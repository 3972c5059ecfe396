"""RewardPool: computes rewards outside the event loop, in processes that can be killed.

- Called by: `collect` and `evaluate` pass finished samples in and get Verdicts.
- A custom function gets the whole Sample. Built-in graders read the text alone, so theirs has no tokens.
- Invariant: whatever a reward function does (hang, crash, raise, leak, return nonsense), it costs only its own task (a
  sample; with --group-rm a group), and the verdict reports it.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slime.config.args import Args
from slime.config.eval_data import eval_datasets
from slime.config.reward_types import BOXED_PREFIX, needs_url
from slime.config.secrets import masker_of
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.dispatcher import Dispatcher
from slime.rollout.reward_pool.process import RewardProcess
from slime.rollout.reward_pool.verdict import Verdict, error_verdict, summed
from slime.rollout.rewards.reward import find_reward, is_async, reward_type

if TYPE_CHECKING:
    from slime.rollout.rewards.remote import RemoteReward

NO_URL = "--rm-url: not given; --rm-type remote_rm sends responses to the judge at that URL; add it"
_NO_REWARD = (
    "--rm-type: not given, and neither is --custom-rm-path nor the data line's metadata.rm_type; "
    "responses need one to be judged, unless --custom-generate-function-path sets sample.reward"
)


class RewardPool:
    """Computes rewards in `--rm-num-workers` processes, which start when the first sample is judged.

    Each of several functions has processes of its own, because one that hangs or dies must not take the others with it,
    and a plain one must not block an async one. A sample is judged by all of them at the same time. From the first
    sample on the pool belongs to one event loop.

    Raises:
        ValueError: no such --rm-type, or --custom-rm-path cannot be loaded.
    """

    def __init__(self, args: Args, log_dir: Path | None = None) -> None:
        """`log_dir` gets a file with each worker's output: reward-N.log, or reward-NAME-N.log for several functions.

        None: the workers print where we print.
        """
        self._args = args
        self._log_dir = log_dir
        self._mask = masker_of(args)
        self._is_async = [is_async(load_hook("custom_rm_path", path)) for path in args.reward_paths] or [False]
        """One entry for each function; built-in rewards are all in one worker."""
        if args.custom_rm_path is None:
            for rm_type in (args.rm_type, *(dataset.rm_type for dataset in eval_datasets(args))):
                _check_type(args, rm_type)
        self._remote = _remote_reward(args)
        self._dispatchers: list[Dispatcher] = []
        """One for each function, made for the first sample, in its event loop."""
        self._closed = False

    @property
    def by_group(self) -> bool:
        """Whether to call `judge_group` instead of `judge`; built-in rewards judge each sample by itself."""
        return self._args.group_rm and self._args.custom_rm_path is not None

    async def judge(self, sample: Sample, *, rm_type: str | None = None) -> Verdict:
        """Return the reward of one sample. `rm_type` replaces --rm-type; the sample's metadata goes before both.

        Raises:
            ValueError: no reward is named for it, or --group-rm requires whole groups.
            RuntimeError: the workers do not start, or are closed.
        """
        if self.by_group:
            raise ValueError("--group-rm: the reward function takes whole groups; call judge_group")
        rm_type = reward_type(self._args, sample, rm_type)
        if rm_type is None and self._args.custom_rm_path is None:
            raise ValueError(_NO_REWARD)
        if rm_type is not None and needs_url(rm_type):
            if self._remote is None:
                raise ValueError(NO_URL)
            return await self._remote.judge(sample, boxed=rm_type.startswith(BOXED_PREFIX))
        judged = sample if self._args.custom_rm_path is not None else sample.to_graded_text()
        [verdict] = await self._call((rm_type, judged), 1)
        return verdict

    async def judge_group(self, samples: Sequence[Sample]) -> None:
        """Judge those of a group that are finished and have no reward yet, in one call, and write the verdicts.

        Raises:
            ValueError: rewards are not computed by group (`by_group`).
        """
        if not self.by_group:
            raise ValueError("--group-rm, --custom-rm-path: not both given; judge takes one sample at a time")
        finished = (Status.COMPLETED, Status.TRUNCATED)
        unjudged = [sample for sample in samples if sample.status in finished and sample.reward is None]
        if unjudged:
            verdicts = await self._call((None, unjudged), len(unjudged))
            for sample, verdict in zip(unjudged, verdicts, strict=True):
                verdict.apply(sample)

    async def _call(self, what: tuple[str | None, Sample | list[Sample]], count: int) -> list[Verdict]:
        """Call each reward function once in a worker, and return `count` verdicts, the sums if there are several."""
        try:
            payload = pickle.dumps(what)
        except Exception as error:  # noqa: BLE001 (metadata may hold anything; if it cannot be sent, its task fails)
            return [error_verdict(error)] * count
        answers = await asyncio.gather(*(dispatcher.judge(payload) for dispatcher in self._open()))
        by_function = [verdicts * count if len(verdicts) < count else verdicts for verdicts in answers]
        verdicts = by_function[0]
        if len(by_function) > 1:
            names, key = self._args.reward_names, self._args.reward_key
            assert key is not None, "resolve fills it in for several functions"
            weights = self._args.reward_weights or (1.0,) * len(names)
            of_samples = zip(*by_function, strict=True)
            verdicts = [summed(dict(zip(names, parts, strict=True)), weights, key) for parts in of_samples]
        return [verdict.masked(self._mask) for verdict in verdicts]

    @property
    def workers(self) -> Collection[RewardProcess]:
        """The worker processes, also those that are not ready yet; none before the first sample."""
        return {worker for dispatcher in self._dispatchers for worker in dispatcher.workers}

    def _open(self) -> list[Dispatcher]:
        """Return the dispatcher of each function; the first call starts the workers in the caller's event loop."""
        if self._closed:
            raise RuntimeError("the reward workers are closed")
        loop = asyncio.get_running_loop()
        if not self._dispatchers:
            paths, names = self._args.reward_paths or (None,), self._args.reward_names
            logs = [f"reward-{name}" for name in names] if len(names) > 1 else ["reward"]
            self._dispatchers = [
                Dispatcher(
                    replace(self._args, custom_rm_path=path), loop, is_async=waits, log_dir=self._log_dir, log_name=log
                )
                for path, waits, log in zip(paths, self._is_async, logs, strict=True)
            ]
        for dispatcher in self._dispatchers:
            dispatcher.check(loop)
        return self._dispatchers

    def close(self) -> None:
        """End the workers; their work is lost, and callers that wait for it get an error."""
        self._closed = True
        for dispatcher in self._dispatchers:
            dispatcher.close()


def _check_type(args: Args, rm_type: str | None) -> None:
    if needs_url(rm_type):
        if args.rm_url is None:
            raise ValueError(NO_URL)
    elif rm_type is not None:
        find_reward(rm_type)


def _remote_reward(args: Args) -> RemoteReward | None:
    if args.rm_url is None:
        return None
    from slime.rollout.rewards.remote import RemoteReward  # aiohttp, which workers do without

    return RemoteReward(args)
