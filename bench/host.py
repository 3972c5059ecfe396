"""The way of a rollout from the rollout manager to the model: bytes of each rank, and the host's time per token.

    python -m bench.host              (make bench-host)

One rollout of `--rows` responses is planned and cut for 1, 2, 8 and 64 data-parallel ranks, as the rollout manager does
it, and rank 0 then does what a trainer does on its host before and during a step: advantages, off-policy columns, loss
weights, checks, and the packing of its micro-batches. Everything is one thread's time, and DP 1, where one rank has the
whole batch, is the measure of the others. Invariant: the parts are joined again and must be the batch, bit for bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.common import OUTPUTS, Goal, Spread, Table, in_turns, machine, write_result
from bench.packing import QWEN3_4B
from slime.config.args import Args
from slime.config.rollout_plan import parts_of_rollout
from slime.core.batch import TrainBatch
from slime.core.rank_batch import RankBatch, joined
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_weight_columns
from slime.megatron.microbatch import pack_rows
from slime.megatron.nan_guard import check_columns
from slime.megatron.offpolicy import offpolicy_columns, version_of_weights
from slime.megatron.share import Share

RANKS = (1, 2, 8, 64)
PROMPT, GROUP, VERSION = 200, 16, 4
BYTES_GOAL, TIME_GOAL = 64.0, 32.0
"""With 64 ranks: the batch over a rank's part, and one rank's host time for the whole batch over that for its part."""


def rollout(rows: int, response: int) -> TrainBatch:
    """Make a rollout of responses around this length, a part of whose tokens is one policy version old."""
    chance = np.random.default_rng(0)
    responses_N = chance.integers(response // 2, response * 3 // 2, rows)
    num_responses, total = int(responses_N.sum()), int(responses_N.sum()) + rows * PROMPT
    columns = {
        "tokens": chance.integers(0, QWEN3_4B.vocab_size, total),
        "loss_mask": np.ones(num_responses, dtype="float32"),
        "rewards": (np.arange(rows) % 2).astype("float32"),
        "group_indices": np.arange(rows) // GROUP,
        "sample_indices": np.arange(rows),
        "rollout_log_probs": -chance.exponential(0.5, num_responses).astype("float32"),
        "policy_versions": chance.integers(VERSION - 1, VERSION + 1, num_responses).astype("int32"),
    }
    return TrainBatch(responses_N + PROMPT, responses_N, columns)


def columns_of(args: Args, part: RankBatch) -> TrainBatch:
    """Compute a rank's columns, as `Trainer.train` does with GRPO and one step; the rows of other ranks count as 0."""
    share = Share(part, None)
    part.__dict__.pop("own", None)  # a part that arrives is widened once
    counted_N = counted_rows_of(args, share.rows)
    version = version_of_weights(args, 0, share, VERSION)
    made, _ = offpolicy_columns(args, share, counted_N, version)
    columns = share.own.columns | made
    check_columns("bench", share, columns, counted_N)
    made, _ = advantage_columns(args, share, columns, counted_N)
    columns |= made
    check_columns("bench", share, columns, counted_N, ["advantages"])
    made, _ = loss_weight_columns(args, share, columns, counted_N)
    return TrainBatch(share.own.total_lengths_N, share.own.response_lengths_N, columns | made)


def pack_all(args: Args, part: RankBatch, own: TrainBatch) -> None:
    for step in part.steps:
        for rows in step.micro_batches:
            pack_rows(own, rows, arch=QWEN3_4B, multiple=1, step_tokens=step.num_tokens)


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread: the machine's other work does not count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(args: Args, batch: TrainBatch, rounds: int) -> tuple[Table, list[Goal], dict[str, dict[str, list[float]]]]:
    num_tokens, whole = int(batch.total_lengths_N.sum()), sum(column.nbytes for column in batch.columns.values())
    parts = {ranks: parts_of_rollout(args, batch, num_ranks=ranks, num_steps=1) for ranks in RANKS}
    for cut in parts.values():
        back = joined([part.own.columns for part in cut], cut[0].rows, [part.own_rows_M for part in cut])
        if any(back.columns[name].tobytes() != column.tobytes() for name, column in batch.columns.items()):
            raise RuntimeError("the joined parts are not the batch")
    owns = {ranks: columns_of(args, cut[0]) for ranks, cut in parts.items()}
    cutting = in_turns(
        {str(r): lambda r=r: seconds(lambda: parts_of_rollout(args, batch, num_ranks=r, num_steps=1)) for r in RANKS},
        rounds=rounds,
    )
    columns = in_turns(
        {str(r): lambda r=r: seconds(lambda: columns_of(args, parts[r][0])) for r in RANKS}, rounds=rounds
    )
    packing = in_turns(
        {str(r): lambda r=r: seconds(lambda: pack_all(args, parts[r][0], owns[r])) for r in RANKS}, rounds=rounds
    )
    table = Table(
        f"A rollout of {len(batch):,} rows, {num_tokens / 1e6:.1f} M tokens, {whole / num_tokens:.1f} bytes a token",
        [
            "data-parallel ranks",
            "plan and cut, ns a token",
            "largest part, MB",
            "bytes of an own token",
            "batch / part",
            "a trainer's columns, ns a token of the batch",
            "its packing, ns a token of the batch",
            "host time of DP 1 / this",
        ],
        note="Times are divided by the tokens of the whole rollout: a rank's share of a trainer's work is then 1/DP.",
    )
    times = {r: Spread.of(columns[str(r)]).median + Spread.of(packing[str(r)]).median for r in RANKS}
    for ranks, cut in parts.items():
        largest = max(part.num_bytes for part in cut)
        own_tokens = int(cut[0].own.total_lengths_N.sum())
        own_bytes = sum(column.nbytes for column in cut[0].per_token.values())
        table.rows.append(
            [
                str(ranks),
                _ns(cutting[str(ranks)], num_tokens),
                f"{largest / 1e6:.2f}",
                f"{own_bytes / own_tokens:.1f}",
                f"{whole / largest:.1f}",
                _ns(columns[str(ranks)], num_tokens),
                _ns(packing[str(ranks)], num_tokens),
                f"{times[1] / times[ranks]:.1f}",
            ]
        )
    most = max(part.num_bytes for part in parts[RANKS[-1]])
    goals = [
        Goal(f"bytes of the batch / of a rank's part, DP {RANKS[-1]}", whole / most, BYTES_GOAL),
        Goal(f"host time of DP 1 / of DP {RANKS[-1]}, a trainer", times[1] / times[RANKS[-1]], TIME_GOAL),
    ]
    return table, goals, {"plan and cut": cutting, "columns": columns, "packing": packing}


def _ns(values: Sequence[float], num_tokens: int) -> str:
    return f"{1e9 * Spread.of(values).median / num_tokens:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--response", type=int, default=2048, help="mean tokens of a response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "host.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    args = Args(
        architecture=QWEN3_4B,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=16_384,
        num_steps_per_rollout=1,
        partial_rollout=True,
    )
    facts = machine()
    table, goals, raw = measure(args, rollout(given.rows, given.response), given.rounds)
    write_result(given.out, [table], goals, facts, raw)


if __name__ == "__main__":
    main()
