"""SampleLog: writes the samples of rollouts and evaluations into samples.jsonl, as people read them.

- Called by: the data side, with each rollout, and `evaluate`, with each data set's answers.
- Invariant: rewards are the raw ones, as in the metrics, and secrets are masked. All answers of an evaluation are
  written; of a rollout at most --log-samples-per-rollout, in whole groups. An evaluation comes before the rollout that
  was generated at the same time, whichever ended first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.sample import Sample, Status
from slime.observability.samples_file import TRAIN, Row, SamplesFile
from slime.rollout.reward_pool.verdict import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Groups = Sequence[Sequence[Sample]]


class SampleLog:
    """The samples.jsonl of one run. Rows are made and written in a thread, so that requests go on meanwhile."""

    def __init__(self, path: Path, args: Args, tokenizer: PreTrainedTokenizerBase) -> None:
        self._file = SamplesFile(path)
        self._args = args
        self._tokenizer = tokenizer
        self._mask = masker_of(args)
        self._evaluates = False
        self._held: list[tuple[int, list[Row]]] = []

    async def rollout(self, rollout_id: int, groups: Groups) -> None:
        """Write some of a rollout's groups, evenly spread over it; during an evaluation they wait for its end."""
        chosen = spread(groups, self._args.log_samples_per_rollout)
        if not chosen:
            return
        rows = await asyncio.to_thread(list, self._rows(chosen))
        if self._evaluates:
            self._held.append((rollout_id + 1, rows))
        else:
            await asyncio.to_thread(self._file.write, rollout_id + 1, TRAIN, rows)

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Let the rows of rollouts wait inside the block, and write them at its end."""
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False
            held, self._held = self._held, []
            for step, rows in held:
                self._file.write(step, TRAIN, rows)

    async def evaluation(self, step: int, name: str, groups: Groups) -> None:
        """Write all answers of the data set `name` after `step` rollouts."""
        await asyncio.to_thread(self._file.write, step, f"eval/{name}", self._rows(groups))

    def _rows(self, groups: Groups) -> Iterator[Row]:
        for group in groups:
            tokens: list[int] | None = None
            prompt = ""
            for sample in group:
                if sample.prompt_tokens != tokens:  # the samples of a group usually share their prompt
                    tokens = sample.prompt_tokens
                    text = self._tokenizer.decode(tokens, skip_special_tokens=False)
                    prompt = self._mask(text if isinstance(text, str) else "".join(text))
                yield self._row(sample, prompt)

    def _row(self, sample: Sample, prompt: str) -> Row:
        key = self._args.reward_key
        raw = sample.metadata.get("raw_reward", sample.reward)
        verdict = Verdict(raw, sample.reward_failure).masked(self._mask)
        versions = sample.array("policy_versions")
        row: dict[str, Any] = {
            "group": sample.group_index,
            "index": sample.index,
            "prompt": prompt,
            "response": self._mask(sample.response),
            "label": None if sample.label is None else self._mask(sample.label),
            "reward": verdict.reward,
            "components": {},
            "failure": verdict.failure,
            "status": sample.status.value,
            "truncated": sample.status is Status.TRUNCATED,
            "prompt_tokens": sample.prompt_length,
            "response_tokens": sample.response_length,
            "policy_versions": None if versions is None or not len(versions) else versions[[0, -1]].tolist(),
        }
        if isinstance(verdict.reward, dict):
            row["reward"] = None if key is None else verdict.reward.get(key)
            row["components"] = {name: value for name, value in verdict.reward.items() if name != key}
        if "raw_reward" in sample.metadata:
            row["processed_reward"] = sample.reward_value(key)
        return row


def spread(groups: Groups, count: int) -> list[Sequence[Sample]]:
    """Return at most `count` samples, in whole groups that are evenly spread; only the last one may be cut short.

    >>> [[sample.index for sample in group] for group in spread([[Sample(index=2 * i), Sample(index=2 * i + 1)]
    ...     for i in range(4)], 3)]
    [[0, 1], [4]]
    """
    if not count or not groups:
        return []
    wanted = -(-count // max(1, max(map(len, groups))))
    chosen: list[Sequence[Sample]] = []
    for group in groups[:: max(1, len(groups) // wanted)]:
        part = group[:count]
        count -= len(part)
        if part:
            chosen.append(part)
    return chosen
