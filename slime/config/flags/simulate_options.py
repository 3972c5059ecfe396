"""Flags of `slime plan --simulate`, which runs the scheduler without devices.

- Used by: `config.args`, as one of its sections, like those in `options`.
- Invariant: no default of these flags is written anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.flags.flag import Needs, flag

_SIMULATE = Needs(("simulate",), remedy="add it")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Simulation of the run's schedule, without devices."""

    simulate: bool = flag(
        False,
        "With --dry-run (slime plan): simulate the run's schedule, and print the time of a step, how long engines and "
        "trainers are idle, the best split of the GPUs, and what over-sampling, partial rollout and a rollout ahead "
        "change.",
    )
    simulate_run: str | None = flag(
        None,
        "Directory of a real run, whose args.yaml, metrics.jsonl and samples.jsonl give lengths and speeds.",
        metavar="DIR",
        needs=_SIMULATE,
    )
    simulate_run_rollouts: int | None = flag(
        None, "Take only the first N rollouts of --simulate-run.", ge=1, needs=Needs(("simulate_run",), remedy="add it")
    )
    simulate_samples: str | None = flag(
        None,
        "File with response lengths: a samples.jsonl, or a dump of --save-debug-rollout-data.",
        metavar="FILE",
        needs=_SIMULATE,
    )
    simulate_lengths: tuple[float, ...] = flag(
        (),
        "Mean and 99th percentile of log-normal response lengths in tokens, cut at --rollout-max-response-len.",
        gt=0,
        metavar="MEAN P99",
        nargs=2,
        needs=_SIMULATE,
    )
    simulate_prompt_length: int = flag(256, "Tokens of a prompt, with --simulate-lengths.", ge=1, needs=_SIMULATE)
    simulate_request_speed: float | None = flag(
        None, "Tokens/s of a request that an engine runs alone.", gt=0, metavar="TOKENS", needs=_SIMULATE
    )
    simulate_engine_speed: float | None = flag(
        None,
        "Tokens/s of an engine with very many requests. A step of B requests takes a + b B seconds, where 1 / (a + b) "
        "is --simulate-request-speed, and 1 / b this.",
        gt=0,
        metavar="TOKENS",
        needs=_SIMULATE,
    )
    simulate_prefill_speed: float | None = flag(
        None, "Prompt tokens/s of an engine.", gt=0, metavar="TOKENS", needs=_SIMULATE
    )
    simulate_train_tflops: float | None = flag(
        None, "TFLOP/s of a training GPU, without recomputed ones.", gt=0, needs=_SIMULATE
    )
    simulate_sync_seconds: float | None = flag(None, "Seconds of a weight sync.", ge=0, needs=_SIMULATE)
    simulate_save_seconds: float | None = flag(None, "Seconds of a checkpoint.", ge=0, needs=_SIMULATE)
    simulate_offload_seconds: float | None = flag(
        None, "Seconds of a step in which colocated engines and trainers exchange memory.", ge=0, needs=_SIMULATE
    )
    simulate_reward_seconds: float | None = flag(
        None, "Seconds from the end of a response to its reward.", ge=0, needs=_SIMULATE
    )
    simulate_drop_rate: float | None = flag(
        None, "Share of groups that the dynamic filter drops.", ge=0, lt=1, needs=_SIMULATE
    )
    simulate_gpus: int | None = flag(
        None,
        "GPUs that the table of splits divides between training and generation. Unset: those of the plan.",
        ge=2,
        le=65536,
        needs=_SIMULATE,
    )
    simulate_rollouts: int = flag(6, "Rollouts of each simulated run.", ge=4, le=10_000, needs=_SIMULATE)
    simulate_json: str | None = flag(
        None, "File for the results, one JSON object for each row of a table.", metavar="FILE", needs=_SIMULATE
    )
