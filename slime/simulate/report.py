"""The text of `slime plan --simulate`, and its rows as JSON.

- Called by: `cli.simulated`, after the plan.
- Invariant: every number that the results depend on is in the first table, with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from slime.config.args import Args
from slime.config.problem import Problem, UsageError
from slime.core.verbs import Story
from slime.observability.phases import PHASES
from slime.simulate.lengths import Lengths
from slime.simulate.recorded import RUN, RealRun, lengths_of, measured, read_run
from slime.simulate.rollouts import grain_of, refuse_other_runs
from slime.simulate.speeds import Speeds, estimated, with_flags
from slime.simulate.study import Outcome, Study
from slime.simulate.tables import Column, Table

NO_LIMITS = ("evaluations, failures, and a reward that waits for a free worker are not simulated",)


def simulate(args: Args, stories: Mapping[int, Story]) -> str:
    """Return the tables of a simulation of the plan, and write them to --simulate-json.

    Args:
        stories: the training loops by the number of rollouts ahead, 0 and 1.

    Raises:
        UsageError: an input is missing or wrong; the message names the flag, its value, the rule and a remedy.
    """
    refuse_other_runs(args)
    if not args.num_engines or args.architecture is None:
        name = "rollout-num-gpus" if not args.num_engines else "hf-checkpoint"
        rule = "a simulation needs engines" if not args.num_engines else "a simulation needs the model's sizes"
        problem = Problem(severity="error", where=f"--{name}", value="", rule=rule, remedy="give it")
        raise UsageError([problem])
    run = read_run(args)
    if run is not None and args.simulate_drop_rate is None:
        args = replace(args, simulate_drop_rate=run.drop_rate)
    lengths, where = lengths_of(args, run)
    speeds = estimated(args, lengths) if run is None else measured(run, stories, _lengths_of_run(run, lengths))
    speeds = with_flags(args, speeds, lengths)
    study = Study(args, speeds, lengths, stories)
    tables = [
        assumptions(args, speeds, lengths, where, run, study),
        step_table(study.plan()),
        split_table(study),
        effect_table(study),
    ]
    if args.simulate_json is not None:
        _write(Path(args.simulate_json), tables)
    return "\n\n".join(table.text() for table in tables)


def _lengths_of_run(run: RealRun, lengths: Lengths) -> Lengths:
    """Return the run's own lengths, to calibrate with; without samples those of the plan."""
    return run.lengths(run.args.rollout_max_response_len) if run.groups else lengths


def _write(path: Path, tables: list[Table]) -> None:
    try:
        path.write_text("".join(f"{record}\n" for table in tables for record in table.records()))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        problem = Problem(severity="error", where="--simulate-json", value=str(path), rule=rule, remedy="name another")
        raise UsageError([problem]) from error


def assumptions(args: Args, speeds: Speeds, lengths: Lengths, where: str, run: RealRun | None, study: Study) -> Table:
    """Return every number that the results depend on."""
    columns = [Column("name", "what"), Column("value", "value"), Column("source", "from")]
    table = Table("assumptions", "Assumptions of the simulation", columns, notes=NO_LIMITS)
    drop = args.simulate_drop_rate
    drop_source = "--simulate-drop-rate" if run is None or drop != run.drop_rate else RUN
    grain = grain_of(args)
    counted = f"{study.rollouts} rollouts a run, lengths by {grain} token{'s' if grain > 1 else ''}"
    rows = [
        ("responses", f"mean {lengths.mean:,.0f} tokens, at most {lengths.longest:,}", where),
        *((row.name, row.value, row.source) for row in speeds.assumptions()),
        ("dropped groups", f"{drop or 0:.0%}", drop_source if drop else "no filter: --simulate-drop-rate"),
        ("size", counted, "--simulate-rollouts, a minute at most"),
    ]
    for name, value, source in rows:
        table.rows.append({"name": name, "value": value, "source": source})
    return table


def step_table(outcome: Outcome) -> Table:
    """Return the phases of a step of the plan, and how busy its devices are."""
    loop = "train_async.py" if outcome.args.rollouts_ahead else "train.py"
    title = f"A step of the plan, {loop}: {outcome.seconds:,.3g} s (mean of {len(outcome.steps)})"
    columns = [Column("name", "what"), Column("seconds", "seconds", "seconds"), Column("share", "share", "share")]
    columns += [Column("unit", "")]
    table = Table("step", title, columns)
    waited = "generation, waited for" if outcome.args.rollouts_ahead else "generation"
    for phase in (*PHASES, "idle"):
        seconds = outcome.phase(phase)
        if seconds > 0:
            name = waited if phase == "generation" else phase.replace("_", " ")
            table.rows.append({"name": name, "seconds": seconds, "share": seconds / outcome.seconds, "unit": ""})
    facts: list[tuple[str, float | None, float | None, str]] = [
        ("engines idle", None, outcome.engines_idle, "of their time"),
        ("trainers idle", None, outcome.trainers_idle, "of their time"),
        ("requests of a busy engine", outcome.running, None, "running, mean"),
        ("response tokens generated", outcome.generated_per_second, None, "a second"),
        ("tokens trained on", outcome.trained_per_second, None, "a second"),
        ("the same of one GPU", outcome.trained_per_second / outcome.gpu_count, None, "a second"),
        ("tokens of older weights", None, outcome.old_tokens, "of those trained on"),
    ]
    table.rows += [
        {"name": name, "seconds": number, "share": share, "unit": unit} for name, number, share, unit in facts
    ]
    return table


def split_table(study: Study) -> Table:
    """Return the step time of each split of the GPUs, with the best one marked."""
    columns = [
        Column("train", "training", "count"),
        Column("generate", "generation", "count"),
        Column("seconds", "s a step", "seconds"),
        Column("trained", "trained tokens/s", "rate"),
        Column("engines_idle", "engines idle", "share"),
        Column("trainers_idle", "trainers idle", "share"),
        Column("note", ""),
    ]
    found = study.splits()
    best = min(found, key=lambda outcome: outcome.seconds, default=None)
    total = study.plan().args.simulate_gpus or study.plan().gpu_count
    loop = "train_async.py" if study.plan().args.rollouts_ahead else "train.py"
    table = Table("splits", f"Splits of {total:,} GPUs, {loop}", columns)
    for outcome in found:
        args = outcome.args
        notes = ["shared"] if args.colocate else []
        notes += ["best"] if outcome is best else []
        table.rows.append(
            {
                "train": args.actor_world_size,
                "generate": args.rollout_num_gpus,
                "seconds": outcome.seconds,
                "trained": outcome.trained_per_second,
                "engines_idle": outcome.engines_idle,
                "trainers_idle": outcome.trainers_idle,
                "note": ", ".join(notes),
            }
        )
    if not found:
        table.notes = (f"{total} GPUs cannot be divided: training needs whole replicas, generation whole engines",)
    return table


def effect_table(study: Study) -> Table:
    """Return what each technique changes."""
    columns = [
        Column("name", "technique"),
        Column("plan", "plan"),
        Column("off", "s off", "seconds"),
        Column("on", "s on", "seconds"),
        Column("change", "tokens/s", "change"),
        Column("engines_off", "idle off", "share"),
        Column("engines_on", "idle on", "share"),
        Column("old_tokens", "old", "share"),
    ]
    table = Table("effects", "What changes a step of the plan, each alone", columns)
    for name, planned, off, on in study.effects():
        table.rows.append(
            {
                "name": name,
                "plan": "on" if planned else "off",
                "off": off.seconds,
                "on": on.seconds,
                "change": on.trained_per_second / off.trained_per_second - 1,
                "engines_off": off.engines_idle,
                "engines_on": on.engines_idle,
                "old_tokens": on.old_tokens,
            }
        )
    table.notes = (
        "s: seconds of a step without and with it; tokens/s: trained on; idle: engines without a request",
        "old: tokens that older weights sampled; over-sampling keeps groups that end first, so shorter ones",
    )
    return table
