"""Saving and restoring the samples of a checkpoint, compared with a plain write and read of the same bytes.

    python -m bench.state             (make bench-state)

A partial rollout has left 10,000 samples of 2,000 tokens in the data buffer. They are saved as a checkpoint saves them
(columns, file, digest, manifest) and restored as a resumed run does it (manifest, digest, file, samples). The JSON of
earlier versions is measured with a part of the same samples. Invariant: what is restored equals what was saved.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.common import OUTPUTS, Goal, Spread, Table, machine, write_result
from slime.core.sample import Sample, Status
from slime.core.sample_columns import from_columns, to_columns
from slime.megatron.checkpoint.manifest import (
    STATE_FILE,
    changed_files,
    digests_of_small_files,
    read_state,
    sizes,
    write_state,
    written_files,
)
from slime.megatron.checkpoint.state_arrays import ARRAYS_FILE, put_back, split, write_arrays

PROMPT_TOKENS, GROUP = 200, 16
SAVE = ("samples to columns", "file, digest and manifest")
RESTORE = ("manifest and digest", "file to columns", "columns to samples")
PLAIN = ("plain write", "plain read")
WHAT = ("save", "restore")
JSON = ("JSON: samples to text, twice", "JSON: text to samples, and its checksum")
FASTER = (17.0, 14.0)
"""The goals: 20 M tokens took 17 s to save as JSON and 14 s to read (which five parts of a start did), now 1 s each."""
_T = TypeVar("_T")


class Times:
    """Wall and CPU seconds of each part, for each round."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def of(self, part: str, work: Callable[[], _T]) -> _T:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu.setdefault(part, []).append(time.process_time() - cpu)
        self.wall.setdefault(part, []).append(time.perf_counter() - wall)
        return result


def partial_samples(num_samples: int, num_tokens: int) -> list[list[Sample]]:
    """Return groups of samples that an abort has cut off, with random tokens and log-probs."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            group_index=index // GROUP,
            index=index,
            prompt="x" * 4 * PROMPT_TOKENS,
            label="1",
            prompt_length=PROMPT_TOKENS,
            response="word " * (num_tokens * 4 // 5),
            response_length=num_tokens,
            status=Status.ABORTED,
            metadata={"start_rollout_id": 0},
        )
        for index in range(num_samples)
    ]
    for sample in samples:  # as an engine's answer sets them: log-probs are those of float32
        sample.set_arrays(
            tokens=rng.integers(0, 150_000, PROMPT_TOKENS + num_tokens).astype(np.int32),
            rollout_log_probs=-rng.exponential(0.5, num_tokens).astype(np.float32).astype(np.float64),
            policy_versions=np.full(num_tokens, 3, dtype=np.int32),
        )
    return [samples[begin : begin + GROUP] for begin in range(0, num_samples, GROUP)]


def save(path: Path, groups: list[list[Sample]], times: Times) -> None:
    """Save the groups as the rollout manager and rank 0 do, without the processes between them."""
    columns = times.of(SAVE[0], lambda: to_columns(groups))

    def write() -> None:
        plain, arrays = split({"rollout_id": 1, "layout": {}, "state": {"buffer": columns}})
        write_arrays(path, arrays)
        write_state(path, plain, digests_of_small_files(path))

    times.of(SAVE[1], write)


def restore(path: Path, times: Times) -> list[list[Sample]]:
    """Restore the groups as rank 0 and the rollout manager do."""

    def check() -> dict[str, Any]:
        if changed := changed_files(path, written_files(path)):
            raise RuntimeError(f"not what was written: {changed}")
        return read_state(path)

    written = times.of(RESTORE[0], check)
    times.of(RESTORE[1], lambda: put_back(path, written))
    return times.of(RESTORE[2], lambda: from_columns(written["state"]["buffer"]))


def plain_copy(path: Path, times: Times) -> None:
    """Write and read the bytes of the arrays' file without looking at them."""
    data = np.fromfile(path / ARRAYS_FILE, dtype=np.uint8)
    times.of(PLAIN[0], lambda: data.tofile(path / "plain"))
    times.of(PLAIN[1], lambda: np.fromfile(path / "plain", dtype=np.uint8))
    (path / "plain").unlink()


def same(ours: Sample, theirs: Sample) -> bool:
    """Compare two samples without turning their arrays into lists."""
    arrays = ("tokens", "rollout_log_probs", "policy_versions")
    others = ("index", "group_index", "prompt", "response", "status", "metadata", "loss_mask", "row")
    return all(np.array_equal(ours.array(name), theirs.array(name)) for name in arrays) and all(  # type: ignore
        getattr(ours, name) == getattr(theirs, name) for name in others
    )


def as_json(groups: list[list[Sample]], times: Times) -> None:
    """Save and restore as earlier versions did: both make the text once more, for its checksum."""

    def dumps() -> str:
        state = [[sample.to_dict() for sample in group] for group in groups]
        json.dumps(state)
        return json.dumps(state)

    text = times.of(JSON[0], dumps)

    def loads() -> list[list[Sample]]:
        state = json.loads(text)
        json.dumps(state)
        return [[Sample.from_dict(sample) for sample in group] for group in state]

    times.of(JSON[1], loads)


def measure(
    groups: list[list[Sample]], times: Times, *, under: Path, rounds: int, in_json: list[list[Sample]]
) -> tuple[int, int]:
    """Measure all parts in each round, with files under a directory; return the bytes of the two files of the state."""
    found = (0, 0)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=under) as directory:
            path = Path(directory)
            save(path, groups, times)
            written = read_state(path)
            found = sizes(written)[ARRAYS_FILE], (path / STATE_FILE).stat().st_size
            back = restore(path, times)
            if any(not same(*pair) for pair in zip(chain(*back), chain(*groups), strict=True)):
                raise RuntimeError("the restored samples differ from the saved ones")
            del back
            plain_copy(path, times)
            as_json(in_json, times)
    return found


def table_of(times: Times, tokens: Mapping[str, int], note: str) -> Table:
    table = Table("Samples of a checkpoint", ["part", "seconds", "CPU seconds", "CPU ns a token"], note=note)
    for parts in (SAVE, PLAIN[:1], RESTORE, PLAIN[1:], JSON):
        for part in parts:
            cpu = Spread.of(times.cpu[part])
            nanoseconds = f"{1e9 * cpu.median / tokens[part]:.1f}"
            table.rows.append([part, Spread.of(times.wall[part]).show(2), cpu.show(2), nanoseconds])
    return table


def sums(parts: tuple[str, ...], of: Mapping[str, list[float]]) -> list[float]:
    return [sum(turn) for turn in zip(*(of[part] for part in parts), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=2_000, help="response tokens of each sample")
    parser.add_argument("--json-share", type=int, default=20, help="one of so many groups is measured as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "state.json")
    given = parser.parse_args()
    facts = machine()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    groups, times = partial_samples(given.samples, given.tokens), Times()
    in_json = groups[:: given.json_share]
    num_bytes, manifest_bytes = measure(groups, times, under=OUTPUTS, rounds=given.rounds, in_json=in_json)
    total = given.samples * given.tokens
    tokens: dict[str, int] = dict.fromkeys((*SAVE, *RESTORE, *PLAIN), total)
    tokens |= {part: given.tokens * sum(len(group) for group in in_json) for part in JSON}
    note = (
        f"{given.samples:,} samples, {total / 1e6:g} M tokens of responses, each with a log-prob and a version: "
        f"{num_bytes / total:.1f} bytes a token, and a manifest of {manifest_bytes:,} bytes. "
        f"JSON is measured with {100 / given.json_share:g} % of the samples. Medians, with lowest and highest."
    )
    million = f"{total / 1e6:g} M tokens"
    ours = [Spread.of(sums(parts, times.cpu)).median for parts in (SAVE, RESTORE)]
    theirs = [Spread.of(times.cpu[part]).median * total / tokens[part] for part in JSON]
    file, load = (sums(parts, times.wall) for parts in (SAVE[1:], RESTORE[:2]))
    ratios = Table("Ratios of the seconds in one round", ["what", "ratio"])
    for what, mine, plain in (
        ("file, digest and manifest / plain write", file, times.wall[PLAIN[0]]),
        ("manifest, digest and file / plain read", load, times.wall[PLAIN[1]]),
        ("whole save / plain write", sums(SAVE, times.wall), times.wall[PLAIN[0]]),
        ("whole restore / plain read", sums(RESTORE, times.wall), times.wall[PLAIN[1]]),
    ):
        ratios.rows.append([what, Spread.of(a / b for a, b in zip(mine, plain, strict=True)).show(2)])
    goals = [
        Goal(f"JSON twice / save, {million}", theirs[0] / ours[0], FASTER[0]),
        Goal(f"JSON once / restore, {million}", theirs[1] / ours[1], FASTER[1]),
        *(Goal(f"1 s / CPU seconds to {what} {million}", 1 / each, 1.0) for what, each in zip(WHAT, ours, strict=True)),
    ]
    write_result(
        given.out, [table_of(times, tokens, note), ratios], goals, facts, {"wall": times.wall, "cpu": times.cpu}
    )


if __name__ == "__main__":
    main()
