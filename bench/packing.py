"""Plans of rows into micro-batches, compared with the smallest possible number, and the time to make them.

    python -m bench.packing           (make bench-packing)

The sets of rows are random, as one rank of a rollout has them: 32 to 512 rows, a token budget that holds 2 to 40 of
them, padded as tensor and context parallelism require. The lower bound is Martello and Toth's L2, which no packing can
beat; next fit (rows in order, a new micro-batch when one does not fit) is the naive method. Then one large step is
planned, and long rows are planned for pipelines, whose schedule (1F1B) is computed. Invariant: every plan is checked:
each row once, no micro-batch over the budget.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.common import OUTPUTS, Goal, Spread, Table, machine, write_result
from slime.core.architecture import Architecture
from slime.core.packing import StepPlan, plan_steps, training_flops
from slime.simulate.pipeline import pipeline_times

Lengths = NDArray[np.int64]

GOAL = 1.02
SECONDS = 2.0
LONGEST = 8192
PADDINGS = ((1, 1), (1, 8), (4, 8))
"""A row is padded to a multiple of the first, a micro-batch to one of the second: alone, TP 8, and CP 2 with TP 4."""
DISTRIBUTIONS = {
    "log-normal": "median 1,000, sigma 0.8, cut at 8,192",
    "uniform": "100–4,000",
    "bimodal": "70 % normal around 600 ± 200, 30 % around 3,500 ± 400",
}
QWEN3_4B = Architecture(
    family="qwen3",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    qk_layernorm=True,
    tied_embeddings=True,
)


def draw_lengths(kind: str, num_rows: int, rng: np.random.Generator) -> Lengths:
    """Draw the tokens of rows that follow one of `DISTRIBUTIONS`."""
    if kind == "uniform":
        return rng.integers(100, 4001, num_rows)
    if kind == "log-normal":
        drawn = 1000 * np.exp(0.8 * rng.standard_normal(num_rows))
    else:
        is_long = rng.random(num_rows) < 0.3
        drawn = np.where(is_long, rng.normal(3500, 400, num_rows), rng.normal(600, 200, num_rows))
    return np.clip(drawn, 32, LONGEST).astype(np.int64)


def l2_bound(lengths: Sequence[int] | Lengths, budget: int) -> int:
    """Martello and Toth's L2 (Discrete Applied Mathematics 28, 1990), a lower bound on the bins of size `budget`.

    Items of more than half a bin have one bin each. Take a threshold a: items above `budget` - a share their bin with
    no item between a and half a bin, so those items have to fit into the room of the other bins, and then into further
    bins. The bound is the maximum over a. An item larger than a bin fills one.
    """
    items = np.sort(np.minimum(np.asarray(lengths, dtype=np.int64), budget))
    sums = np.concatenate([[0], np.cumsum(items)])
    half = int(np.searchsorted(items, budget // 2, side="right"))
    thresholds = np.unique(np.concatenate([[0], items[:half]]))
    alone_from = np.maximum(np.searchsorted(items, budget - thresholds, side="right"), half)
    small_from = np.searchsorted(items[:half], thresholds)
    room = (alone_from - half) * budget - (sums[alone_from] - sums[half])
    left_over = np.maximum(sums[half] - sums[small_from] - room, 0)
    return int((len(items) - half + -(-left_over // budget)).max())


def next_fit(lengths: Lengths, budget: int) -> int:
    """Return the number of micro-batches when rows are taken in order."""
    count, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            count, room = count + 1, budget
        room -= length
    return count


def check(plan: StepPlan, padded: Lengths, budget: int) -> None:
    """Check that every row is planned once and that no micro-batch of several rows is over `budget`."""
    rows = Counter(row for rank in plan.micro_batches for rows in rank for row in rows)
    if rows != Counter(range(len(padded))):
        raise RuntimeError("a plan does not hold every row exactly once")
    lengths = padded.tolist()
    shared = [rows for rank in plan.micro_batches for rows in rank if len(rows) > 1]
    fullest = max((sum(lengths[row] for row in rows) for rows in shared), default=0)
    if fullest > budget:
        raise RuntimeError(f"a micro-batch of {fullest} tokens is over its budget of {budget}")


@dataclass(frozen=True)
class Packed:
    """The result for one set."""

    micro_batches: int
    bound: int
    next_fit: int
    fill: float


def pack_set(kind: str, rng: np.random.Generator) -> Packed:
    """Draw a set of rows and a budget, and pack it for a single rank."""
    lengths = draw_lengths(kind, int(rng.integers(32, 513)), rng)
    row_multiple, multiple = PADDINGS[rng.integers(len(PADDINGS))]
    budget = int(lengths.mean() * np.exp(rng.uniform(np.log(2), np.log(40))))
    (plan,) = plan_steps(
        lengths.tolist(),
        num_steps=1,
        dp_size=1,
        max_tokens=budget,
        micro_batch_size=1,
        multiple=multiple,
        row_multiple=row_multiple,
    )
    padded = -(-lengths // row_multiple) * row_multiple
    usable = budget // multiple * multiple
    check(plan, padded, usable)
    return Packed(
        plan.num_micro_batches,
        l2_bound(padded, usable),
        next_fit(padded, usable),
        plan.fill(lengths.tolist(), budget),
    )


def packing_table(num_sets: int) -> tuple[Table, list[Goal], dict[str, list[float]]]:
    table = Table(
        "Micro-batches of one rank over the L2 bound",
        ["lengths", "sets", "mean", "worst", "sets at the bound", "fill", "next fit, mean", "ms a plan"],
    )
    goals: list[Goal] = []
    raw: dict[str, list[float]] = {}
    for number, (kind, meaning) in enumerate(DISTRIBUTIONS.items()):
        rng = np.random.default_rng(number)
        start = time.perf_counter()
        packed = [pack_set(kind, rng) for _ in range(num_sets)]
        milliseconds = 1e3 * (time.perf_counter() - start) / num_sets
        raw[kind] = [one.micro_batches / one.bound for one in packed]
        mean = float(np.mean(raw[kind]))
        row = [f"{kind}: {meaning}", f"{num_sets:,}", f"{mean:.4f}", f"{max(raw[kind]):.3f}"]
        row.append(f"{100 * np.mean([one.micro_batches == one.bound for one in packed]):.1f}%")
        row.append(f"{100 * np.mean([one.fill for one in packed]):.1f}%")
        row.append(f"{np.mean([one.next_fit / one.bound for one in packed]):.3f}")
        table.rows.append([*row, f"{milliseconds:.1f}"])
        goals.append(Goal(f"L2 bound / micro-batches, {kind} lengths", 1 / mean, round(1 / GOAL, 4)))
    table.note = "Sets of 32–512 rows, budgets of 2–40 mean rows; the time includes drawing, checking and bounding."
    return table, goals, raw


def planning_table(num_rows: int, num_ranks: int, rounds: int) -> tuple[Table, list[Goal], dict[str, list[float]]]:
    """Return the figures of one step for many ranks, dealt in contiguous runs and by compute."""
    table = Table(
        f"One step of {num_rows:,} rows over {num_ranks:,} ranks",
        ["lengths", "deal", "seconds", "micro-batches a rank", "at least", "fill", "imbalance"],
    )
    table.note = "Budget 16,384 tokens; compute of a Qwen3-4B. At least: the L2 bound of all rows, over the ranks."
    flops = training_flops(QWEN3_4B)
    raw: dict[str, list[float]] = {}
    budget = 16384
    for number, kind in enumerate(DISTRIBUTIONS):
        lengths = draw_lengths(kind, num_rows, np.random.default_rng(number))
        rows = lengths.tolist()
        fewest = -(-l2_bound(lengths, budget) // num_ranks)
        for balance in (False, True):
            name = f"{kind}, {'--balance-data' if balance else 'contiguous'}"
            raw[name] = []
            for _ in range(rounds):
                start = time.perf_counter()
                (plan,) = plan_steps(
                    rows,
                    num_steps=1,
                    dp_size=num_ranks,
                    max_tokens=budget,
                    micro_batch_size=1,
                    balance=balance,
                    flops=flops,
                )
                raw[name].append(time.perf_counter() - start)
            check(plan, lengths, budget)
            table.rows.append(
                [
                    kind,
                    "`--balance-data`" if balance else "contiguous",
                    Spread.of(raw[name]).show(2),
                    str(plan.num_micro_batches),
                    str(fewest),
                    f"{100 * plan.fill(rows, budget):.1f}%",
                    f"{plan.imbalance(rows, flops):.4f}",
                ]
            )
    slowest = max(Spread.of(seconds).median for seconds in raw.values())
    goal = Goal(f"{SECONDS:g} s / planning {num_rows:,} rows over {num_ranks:,} ranks", SECONDS / slowest, 1.0)
    return table, [goal], raw


LONG = {
    "median 12,000, sigma 1.1, cut at 131,072": (12000, 1.1, 131072),
    "median 6,000, sigma 0.9, cut at 32,768": (6000, 0.9, 32768),
}


def pipeline_table() -> tuple[Table, dict[str, list[float]]]:
    """Return the time of pipelines over an even division of the work, for rows in order of packing and of cost."""
    table = Table(
        "A step in a pipeline (1F1B) over an even division among its stages",
        ["lengths", "stages", "micro-batches", "equal ones", "as packed", "by cost"],
        note="8,192 log-normal rows for 64 ranks, a budget of the longest row, compute of a Qwen3-4B; mean over ranks. "
        "Equal ones: (M + P - 1) / M, the bubble of micro-batches without differences.",
    )
    raw: dict[str, list[float]] = {}
    flops = training_flops(QWEN3_4B)
    for number, (kind, (median, sigma, longest)) in enumerate(LONG.items()):
        drawn = median * np.exp(sigma * np.random.default_rng(number).standard_normal(8192))
        lengths = np.clip(drawn, 300, longest).astype(np.int64).tolist()
        plans: list[StepPlan] = []
        for lockstep in (False, True):
            plans += plan_steps(
                lengths,
                num_steps=1,
                dp_size=64,
                max_tokens=longest,
                micro_batch_size=1,
                balance=True,
                flops=flops,
                lockstep=lockstep,
            )
        costs = [
            [[sum(flops(lengths[row]) for row in rows) for rows in rank] for rank in p.micro_batches] for p in plans
        ]
        for stages in (2, 4, 8):
            times = [float(np.mean(pipeline_times(ranks, stages) / np.sum(ranks, 1))) for ranks in costs]
            count = plans[0].num_micro_batches
            raw[f"{kind}, {stages} stages"] = times
            shown = (1 + (stages - 1) / count, *times)
            table.rows.append([kind, str(stages), str(count), *(f"{time:.3f}" for time in shown)])
    return table, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=10_000, help="sets of each distribution")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "packing.json")
    given = parser.parse_args()
    facts = machine()
    planning, planning_goals, seconds = planning_table(given.rows, given.ranks, given.rounds)
    packing, packing_goals, found = packing_table(given.sets)
    pipelines, times = pipeline_table()
    raw = {"seconds": seconds, "micro-batches over the bound": found, "pipelines": times}
    write_result(given.out, [packing, planning, pipelines], packing_goals + planning_goals, facts, raw)


if __name__ == "__main__":
    main()
