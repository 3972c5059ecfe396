"""The lines that stay on the console: one for each rollout, one for each evaluated data set, one for progress.

- Used by: `run_console`, with the records that also go to metrics.jsonl.
- Invariant: a line has at most `width` columns. What does not fit is left out as a whole; metrics.jsonl has everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slime.observability.console.text import PLAIN_WIDTH, clock, duration, joined, number, short_count
from slime.observability.console.view import View
from slime.observability.phases import PHASES

SMALLEST_SHARE = 0.03
RELIABLE = 0.5
"""Share of samples from which on tokens/s is shown: it counts ended responses only, so it begins too low."""
ROLLOUT_PARTS = (
    ("rollout/reward", "reward", ".3f"),
    ("rollout/response_length", "length", ".0f"),
    ("train/loss", "loss", ".4f"),
    ("train/grad_norm", "grad", ".3f"),
    ("train/logprob_gap_mean", "gap", ".0e"),
)
SHORT = {
    "generation": "gen",
    "reward": "judge",
    "training": "train",
    "weight_sync": "sync",
    "checkpoint": "save",
    "evaluation": "eval",
}
"""Names of phases in a rollout's line, which has to hold all of them."""
EVALUATION_PARTS = {
    "response_length": ("length", ".1f"),
    "loss": ("loss", ".4f"),
    "truncated": ("truncated", ".3f"),
    "format": ("format", ".3f"),
}
NOT_SHOWN = ("num_prompts", "num_examples", "trained_tokens", "time", "response_length_max")


def rollout_line(rollout_id: int, record: Mapping[str, float], width: int = PLAIN_WIDTH) -> str:
    """Return a rollout's line. Of the phases, the shortest are left out first; then numbers, from the last on."""
    numbers = [f"{text} {number(record[key], form)}" for key, text, form in ROLLOUT_PARTS if key in record]
    shares = shares_of(record, record["time/step"])
    while True:
        times = [
            duration(record["time/step"]),
            *(f"{SHORT.get(name, name)} {share:.0%}" for name, share in shares.items()),
        ]
        line = f"rollout {rollout_id}: {' '.join([*numbers, '|', *times])}"
        if len(line) <= width or not (shares or numbers):
            return line
        if shares:
            del shares[min(shares, key=lambda name: shares[name])]
        else:
            numbers.pop()


def shares_of(seconds: Mapping[str, float], whole: float) -> dict[str, float]:
    """Return the phases that took at least SMALLEST_SHARE of `whole`, in their order."""
    found = {name: seconds.get(f"time/{name}", 0.0) / whole if whole > 0 else 0.0 for name in (*PHASES, "idle")}
    return {name: share for name, share in found.items() if share >= SMALLEST_SHARE}


def evaluation_lines(step: int, record: Mapping[str, float], width: int = PLAIN_WIDTH) -> list[str]:
    """Return one line for each evaluated data set; an ERROR line if all of its responses failed."""
    names = sorted({key.split("/")[1] for key in record if key.startswith("eval/") and key.count("/") == 2})
    return [_evaluation_line(name, step, _values_of(name, record), width) for name in names]


def results_of(record: Mapping[str, float]) -> dict[str, float]:
    """Return the rewards of an evaluation by data set; of supervised training, the losses by 'NAME loss'."""
    found: dict[str, float] = {}
    for key, value in record.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "eval" and parts[2] in ("reward", "loss"):
            found[parts[1] if parts[2] == "reward" else f"{parts[1]} loss"] = value
    return found


def _values_of(name: str, record: Mapping[str, float]) -> dict[str, float]:
    prefix = f"eval/{name}/"
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def _evaluation_line(name: str, step: int, values: dict[str, float], width: int) -> str:
    when = f"after {count(step, 'rollout')}"
    if "reward" not in values and values.get("failed") == 1:
        return f"ERROR eval {name} {when} has no reward: all responses failed; logs/rollout.log has the reasons"
    errors = {
        key: f" ± {number(values.pop(f'{key}_stderr'), '.3f')}" for key in list(values) if f"{key}_stderr" in values
    }
    if not values.get("failed"):
        values.pop("reward_judged", None)  # it equals the reward
        values.pop("failed", None)
    first = [key for key in ("reward", "failed", "reward_judged") if key in values]
    passes = [key for key in values if key.startswith("pass@")]
    known = [key for key in EVALUATION_PARTS if key in values]
    others = [key for key in values if key not in {*first, *passes, *known, *NOT_SHOWN}]
    parts: list[str] = []
    for key in [*first, *passes, *known, *others]:
        text, form = EVALUATION_PARTS.get(key, (key, ".3f"))
        parts.append(f"{text} {number(values[key], form)}{errors.get(key, '')}")
    head = f"eval {name} {when}: "
    return head + joined(parts or ["no metric"], max(width - len(head), 1)) if parts else head.rstrip(": ")


def count(many: int, what: str) -> str:
    """Return '1 rollout', '2 rollouts'."""
    return f"{many} {what}" if many == 1 else f"{many} {what}s"


def progress_line(view: View, now: float, width: int = PLAIN_WIDTH) -> str | None:
    """Return the line of a phase in progress for a plain log; None if there is none."""
    phase = view.phase
    if phase is None:
        return None
    verb = "" if phase.name == "evaluation" else f" {phase.verb}"  # its place says it already
    parts = [f"{phase.where}:{verb}", *samples_parts(view)]
    left, of_run = view.phase_left(now), view.run_left(now)
    if view.samples is None:
        parts.append(f"for {clock(now - phase.since)}")
    if left is not None:
        parts.append(f"{clock(left)} left")
    if of_run is not None:
        parts.append(f"run {clock(of_run)} left")
    return joined(parts, width)


def samples_parts(view: View) -> Sequence[str]:
    """Return the samples of the phase as parts of a line: how many of all, tokens/s, what is judged and dropped."""
    samples = view.samples
    if samples is None:
        ahead = view.ahead
        return [] if ahead is None else [f"next rollout {ahead.generated}/{ahead.total}"]
    parts = [f"{samples.generated}/{samples.total} samples"]
    if samples.tokens and samples.share >= RELIABLE:
        parts.append(f"{short_count(samples.tokens_per_second)} tokens/s")
    if samples.generated - samples.judged > samples.total // 20:
        parts.append(f"{samples.judged} judged")
    if samples.dropped:
        parts.append(f"{count(samples.dropped, 'group')} dropped")
    return parts
