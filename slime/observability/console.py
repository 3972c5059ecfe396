"""The console of a run: a progress bar, one line for each rollout, and lines for evaluations.

- Used by: the driver, with the records that also go to metrics.jsonl.
- Invariant: nothing here changes the run.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slime.observability.phases import format_memory, format_shares


class RunConsole:
    """Shows a progress bar on a terminal, and plain lines if the output is a file."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]rollouts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("rollouts", total=total, completed=done, status="")
        self._eval = ""
        self._progress.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(escape(text))

    def evaluation(self, step: int, record: Mapping[str, float]) -> None:
        """Print one line for each evaluated dataset."""
        names = sorted({key.split("/")[1] for key in record if key.startswith("eval/") and key.count("/") == 2})
        rewards = {name: record[f"eval/{name}/reward"] for name in names if f"eval/{name}/reward" in record}
        self._eval = " ".join(f"{name} {reward:.3f}" for name, reward in rewards.items())
        for name in names:
            prefix = f"eval/{name}/"
            values = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
            if name not in rewards and values.get("failed") == 1:
                why = "all responses failed; logs/rollout.log has the reasons"
                self.say(f"ERROR eval {name} after {step} rollouts has no reward: {why}")
                continue
            errors = {key: f" ± {values.pop(f'{key}_stderr'):.3f}" for key in list(values) if f"{key}_stderr" in values}
            if not values.get("failed"):
                values.pop("reward_judged", None)  # it equals the reward
            reward = f" reward {values.pop('reward'):.3f}{errors.get('reward', '')}" if name in rewards else ""
            line = f"eval {name} after {step} rollouts:{reward}"
            self.say(line + "".join(f"  {key} {value:.4g}{errors.get(key, '')}" for key, value in values.items()))

    def rollout(self, step: int, record: Mapping[str, float]) -> None:
        """Print one line for the rollout, and update the bar."""
        status = "".join(
            f"{text} {record[key]:{form}}  "
            for key, text, form in (
                ("rollout/reward", "reward", ".3f"),
                ("rollout/response_length", "length", ".1f"),
                ("train/loss", "loss", ".4f"),
                ("train/grad_norm", "grad", ".3f"),
                ("train/logprob_gap_mean", "gap", ".1e"),
                ("train/dp_imbalance", "DP imbalance", ".3f"),
            )
            if key in record
        )
        shares, memory = format_shares(record), format_memory(record)
        self.say(f"rollout {step}: {status}| {shares}{f' | {memory}' if memory else ''}")
        self._progress.update(
            self._task, completed=step, status=f"{status}{'eval ' + self._eval if self._eval else ''}"
        )

    def close(self) -> None:
        self._progress.stop()
