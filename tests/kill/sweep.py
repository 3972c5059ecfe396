"""The kill sweep: runs are killed at random moments, continue, and have to end like the unbroken run.

- What it does: it watches one unbroken run (`life`) and draws moments from it. For each moment it starts a run in which
  one process is killed at that moment, and `compare` finds out whether the end differs.
- Invariant: a kill is a SIGKILL by id to a process of a run that was started here, and a result counts only after all
  processes of its run are gone.

If the driver dies, the run ends, and the sweep starts it again at once with the same command, as a supervisor would. If
a trainer or the rollout manager dies, the run itself restarts (--max-restarts). In every third of these kills it ends
instead with an error that names what failed (--max-restarts 0), and the sweep starts it again. Some of the runs that
were started again are killed a second time, before they have continued.

Every third time the driver gets SIGINT or SIGTERM instead, alone or with its process group, once or twice. The run has
to end with the signal's status, and is started again with the command that it printed. After one signal it has to go on
with all that was trained. In most of these runs few saves are due, so that there is something to save.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from slime.megatron.checkpoint.manifest import STATE_FILE, read_state, sealed
from tests.cluster.runs import Task
from tests.kill import life as phases
from tests.kill.compare import DUMPS, EXPORTS, differences
from tests.kill.life import Life, Span
from tests.kill.one_run import Run, kill

NUM_ROLLOUTS = 4
TRIES = 3
"""The number of tries: a busy machine may miss a phase of some hundredths of a second."""
SAVE = "run"
"""The directory of --save, in a run's directory."""
DRIVER, TRAINER, MANAGER = "driver", "trainer", "rollout manager"
VICTIMS = (DRIVER, TRAINER, MANAGER)
_ORDER = (
    *(phases.WRITE, phases.SYNC, phases.GENERATION, phases.TRAINING),
    *(phases.WRITE, phases.SYNC, phases.SAVE, phases.START),
)
"""Phases, which are chosen in turn: a random moment would rarely be in a write or a weight sync, which are short."""
STOP_EVERY = 3
SEEN_S = 0.05
"""The shortest span in which a kill is drawn: a phase of an asynchronous run may be over before it is looked at."""
_STOP_ORDER = (
    *(phases.GENERATION, phases.TRAINING, phases.EVALUATION, phases.SYNC, phases.SAVE, phases.START),
    phases.WRITE,
)
SECOND_AFTER_S = 0.7
"""Seconds between two signals; `slime.cluster.life.stop` takes those within half a second for one."""
SELDOM = ("--save-interval", "3")
"""Saves after the third rollout and the fourth."""


def command(task: Task, save: Path, *extra: str) -> list[str]:
    """Return the command of a tiny run in which a rollout leaves everything that it can leave for the next one.

    It has two engines, two trainers, and two steps for each rollout. The filter and failed rewards drop groups, surplus
    and unfinished groups go back to the buffer, and four rollouts need more than the 20 prompts. Weights are sent in
    small buckets, so that a kill finds engines with some new and some old weights.
    """
    return [
        *("--hf-checkpoint", str(task.model), "--ref-load", str(task.model)),
        *("--load", str(save), "--save", str(save), "--save-interval", "1", "--keep-last-checkpoints", "2"),
        *("--save-hf", f"{save}/{EXPORTS}/{{rollout_id}}"),
        *("--save-debug-rollout-data", f"{save}/{DUMPS}/{{rollout_id}}.jsonl"),
        *("--prompt-data", f"{task.train}@[0:20]", "--input-key", "prompt", "--label-key", "label"),
        *("--apply-chat-template", "--rollout-shuffle", "--custom-rm-path", "tests.kill.rewards.judge"),
        *("--num-rollout", str(NUM_ROLLOUTS), "--rollout-batch-size", "4", "--n-samples-per-prompt", "3"),
        *("--over-sampling-batch-size", "6", "--partial-rollout", "--partial-rollout-max-tokens", "14"),
        "--dynamic-sampling-filter-path",
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        *("--rollout-max-response-len", "24", "--rollout-temperature", "0.8"),
        *("--eval-prompt-data", f"{task.eval}@[0:4]", "--eval-interval", str(phases.EVAL_INTERVAL)),
        *("--actor-num-gpus-per-node", "2", "--rollout-num-gpus", "2", "--cpu-threads-per-process", "1"),
        *("--num-steps-per-rollout", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "512", "--lr", "1e-3"),
        *("--update-weight-buffer-size", "131072", "--deterministic"),
        *extra,
    ]


@dataclass(frozen=True)
class Kill:
    """A planned kill: which process, and when: `share` of the way into the `number`th occurrence of a phase."""

    victim: str
    rank: int
    phase: str
    number: int
    share: float
    span_seconds: float
    """The seconds that this occurrence took in the unbroken run."""
    restarts: bool
    """Whether the run may restart by itself."""
    again: float | None = None
    """Seconds after which the driver of the restarted run is killed again; None for no second kill."""
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    to_group: bool = False
    """Whether the signals go to the whole process group, as those of a terminal do."""
    seldom: bool = False
    """Whether the run saves seldom."""

    @property
    def stops(self) -> bool:
        """Whether the run is asked to stop, and not killed."""
        return signal.SIGKILL not in self.signals


@dataclass
class Outcome:
    """The outcome of a killed run."""

    name: str
    victim: str
    hit: str = ""
    """The phase that the run was in when it was killed."""
    went_on: str = ""
    resumed_from: str = ""
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list[str])
    problem: str | None = None

    @property
    def equal(self) -> bool:
        return self.problem is None and not self.differences


def draw(count: int, seed: int, spans: Sequence[Span]) -> list[Kill]:
    """Return `count` planned kills; the first two are in the middle of a write and of a weight sync."""
    rng = random.Random(seed)
    start_seconds = spans[0].end - spans[0].start
    kills: list[Kill] = []
    for place in range(count):
        if place % STOP_EVERY == STOP_EVERY - 1:
            kills.append(_draw_stop(place // STOP_EVERY, rng, spans))
            continue
        number = place - place // STOP_EVERY
        phase = _ORDER[number % len(_ORDER)]
        if phase == phases.START and number // len(_ORDER) % 2:
            phase = phases.EVALUATION
        span = rng.choice(_of_phase(phase, spans))
        victim = VICTIMS[(number + number // len(VICTIMS)) % len(VICTIMS)]
        kills.append(
            Kill(
                victim=victim,
                rank=rng.randrange(2),
                phase=phase,
                number=span.number,
                share=rng.random(),
                span_seconds=span.end - span.start,
                restarts=victim != DRIVER and number % 3 != 2,
                again=rng.uniform(0.5, 1.1) * start_seconds if victim == DRIVER and number % 4 == 3 else None,
            )
        )
    return kills


def _of_phase(phase: str, spans: Sequence[Span]) -> list[Span]:
    """Return the spans of a phase; those that another run may not show only if there is no other."""
    found = [span for span in spans if span.phase == phase]
    return [span for span in found if span.end - span.start >= SEEN_S] or found


def _draw_stop(number: int, rng: random.Random, spans: Sequence[Span]) -> Kill:
    """Return the `number`th stop; in most phases something has been trained by then."""
    turn, place = divmod(number, len(_STOP_ORDER))
    phase, seldom = _STOP_ORDER[place], number % 5 != 4
    candidates = _of_phase(phase, spans)
    span = rng.choice(candidates[1:] or candidates)
    sent = (signal.SIGINT, signal.SIGTERM)[(number + turn) % 2]
    return Kill(
        victim=DRIVER,
        rank=0,
        phase=phase,
        number=min(span.number, 1) if phase in (phases.SAVE, phases.WRITE) and seldom else span.number,
        share=rng.random(),
        span_seconds=span.end - span.start,
        restarts=False,
        signals=(sent, sent) if turn % 2 else (sent,),
        to_group=number % 4 < 2,
        seldom=seldom,
    )


def strike(planned: Kill, run: Run) -> str | None:
    """Wait for the moment, kill, and return the phase that the run was in; None if the run had ended before."""
    assert run.process is not None
    life = Life(run.process.pid, run.directory / SAVE)
    there = reached = False
    while not run.ended and not (reached and not there):
        span = life.look()
        if planned.phase == phases.WRITE:
            span = life.writes[-1] if life.is_writing else Span("", 0, 0.0, 0.0)
        there = (span.phase, span.number) == (planned.phase, planned.number)
        reached = reached or there
        if there and life.seconds >= span.start + planned.share * planned.span_seconds:
            break
        time.sleep(phases.POLL_S)
    while not run.ended:
        victim = _victim(planned, life)
        if victim is not None:
            span, idle = life.look(), life.idle()
            if planned.phase == phases.WRITE and life.is_writing:
                span, idle = life.writes[-1], False
            rollout = run.log.count("\nrollout ")
            if _send(planned, victim):
                where = span.phase if span.phase == phases.START else f"{span.phase} of rollout {rollout}"
                return f"after {where}" if idle else where
        time.sleep(phases.POLL_S)
    return None


def _send(planned: Kill, victim: psutil.Process) -> bool:
    """Send the signals; return False if the process had ended before."""
    for place, number in enumerate(planned.signals):
        if place:
            time.sleep(SECOND_AFTER_S)
        if not victim.is_running():
            return place > 0
        if planned.to_group:
            os.killpg(victim.pid, number)  # the driver leads its group; see `Run.start`
        elif not kill(victim, number):
            return place > 0
    return True


def _victim(planned: Kill, life: Life) -> psutil.Process | None:
    if planned.victim == DRIVER:
        return life.driver
    found = life.actors(phases.TRAINER if planned.victim == TRAINER else phases.MANAGER)
    return found[planned.rank % len(found)] if found else None


def broken(run: Run, planned: Kill, reference: Path, spoil: Callable[[Path], None] | None = None) -> Outcome:
    """Run, kill, let the run continue, and compare. `spoil` changes the run's directory before it is started again."""
    begin = time.monotonic()
    rank = f" {planned.rank}" if planned.victim == TRAINER else ""
    sent = " ".join(number.name for number in planned.signals) + " to group" * planned.to_group
    outcome = Outcome(run.directory.name, sent if planned.stops else planned.victim + rank)
    try:
        _break_and_mend(run, planned, outcome, spoil)
        if outcome.problem is None:
            outcome.differences = differences(reference, run.directory / SAVE, all_exports=not planned.seldom)
            left = run.left_over()
            outcome.problem = f"left over: {'; '.join(left)}" if left else None
    except (OSError, ValueError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    finally:
        run.end()
        outcome.seconds = time.monotonic() - begin
    return outcome


def _break_and_mend(run: Run, planned: Kill, outcome: Outcome, spoil: Callable[[Path], None] | None) -> None:
    for _ in range(TRIES):
        shutil.rmtree(run.directory, ignore_errors=True)
        run.start("--max-restarts", "2" if planned.restarts else "0", *(SELDOM if planned.seldom else ()))
        hit = strike(planned, run)
        if hit is not None:
            break
    else:
        outcome.problem = f"missed: the run ended before its {planned.phase} {planned.number}: {run.last_line}"
        return
    outcome.hit = hit
    if planned.stops:
        _resume(run, planned, outcome)
        return
    outcome.went_on = "by itself"
    if run.wait() != 0:
        outcome.went_on = "started again"
        if planned.restarts:
            outcome.problem = f"it did not go on by itself: {run.last_line}"
            return
        if planned.victim != DRIVER and "failed: " not in run.log:
            outcome.problem = f"it does not say what failed: {run.last_line}"
            return
        if spoil is not None:
            spoil(run.directory / SAVE)
        run.start("--max-restarts", "0")
        if planned.again is not None:
            outcome.hit += f", again {_kill_driver(run, planned.again)}"
            run.wait()
            run.start("--max-restarts", "0")
        if run.wait() != 0:
            outcome.problem = f"started again, it failed: {run.last_line}"
            return
    outcome.resumed_from = _resumed_from(run)


def _resumed_from(run: Run) -> str:
    starts = re.findall(r"starting at rollout (\d+)", run.log)
    return f"rollout {starts[-1]}" if len(starts) > 1 else "the start"


def _resume(run: Run, planned: Kill, outcome: Outcome) -> None:
    """Wait for the end of a run that was asked to stop, and continue with the command that it prints."""
    code, trained = run.wait(), run.log.count("\nrollout ")
    if code != 128 + planned.signals[0]:
        outcome.problem = f"the exit status of a run that was stopped is {code}: {run.last_line}"
        return
    told = re.findall(r"^(resume|start again) with:\n(.*)$", run.log, re.MULTILINE)
    if not told:
        outcome.problem = f"it does not say how to go on: {run.last_line}"
        return
    outcome.went_on = told[-1][0]
    run.start_with(shlex.split(told[-1][1]))
    if run.wait() != 0:
        outcome.problem = f"started again, it failed: {run.last_line}"
        return
    outcome.resumed_from = _resumed_from(run)
    first = re.findall(r"starting at rollout (\d+)", run.log)[-1]
    if len(planned.signals) == 1 and int(first) < trained:
        outcome.problem = f"{trained} rollouts were trained, but it went on with rollout {first}"


def _kill_driver(run: Run, seconds: float) -> str:
    """Kill the driver some seconds after its start; return the phase that the run was in."""
    assert run.process is not None
    life = Life(run.process.pid, run.directory / SAVE)
    while not run.ended and life.seconds < seconds:
        life.look()
        time.sleep(phases.POLL_S)
    kill(life.driver)
    return life.spans[-1].phase


def move_cursor(save: Path) -> None:
    """Add the control's defect: move the newest checkpoint's place in the data one prompt ahead."""
    path = max(save.glob("iter_*"))
    state = read_state(path)
    _holder_of("cursor", state["state"]["rollout"])["cursor"] += 1
    (path / STATE_FILE).write_text(sealed(state))


def _holder_of(key: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the dict in `state` that has `key`; the state of groups in flight contains the data source's own."""
    if key in state:
        return state
    inner = (_holder_of(key, value) for value in state.values() if isinstance(value, dict))
    return next((found for found in inner if found), {})


def clear(run: Run, outcome: Outcome) -> None:
    """Remove the checkpoints of a run that ended like the unbroken one; keep those that show a difference."""
    if outcome.equal:
        shutil.rmtree(run.directory / SAVE, ignore_errors=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table, with one line for each kill."""
    rows = [("run", "killed", "in", "went on", "from", "seconds", "")]
    for one in outcomes:
        verdict = "equal" if one.equal else "DIFFERENT" if one.differences else "FAILED"
        rows.append((one.name, one.victim, one.hit, one.went_on, one.resumed_from, f"{one.seconds:.0f}", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    for one in outcomes:
        lines += [f"{one.name}: {text}" for text in [*filter(None, [one.problem]), *one.differences]]
    return "\n".join(lines)


def write_results(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.write_text(json.dumps([{**asdict(one), "equal": one.equal} for one in outcomes], indent=1) + "\n")
