"""Random command lines with hostile values for every flag, and the outcome of each.

- Used by: `__main__` runs thousands, and `test_hostile_lines` some hundreds.
- Invariant: a line depends on its seed and the folder's files alone. It is parsed, checked and planned in this process,
  and starts nothing.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slime.config.flags.table import FlagSpec, all_flags
from slime.config.parse import UsageError
from slime.core.plugins import HOOKS
from slime.plan.fit import load_run
from slime.plan.summary import format_plan
from tests.inputs import files

LIMIT = 5.0
"""The time limit of one line in seconds."""
LONGEST_MESSAGE = 20_000
"""The most characters of all messages about one line: 50 problems of 400."""

INTEGERS = ("0", "-1", "1", "2", "3", "7", "2147483647", "2147483648", str(2**63), str(2**64), str(10**30),
            "9" * 5000, "9" * 500 + "T", "1_000", "0x10", "+5", "-0", "1e3", "٣", "1.0", "1k", "64Ki")  # fmt: skip
FLOATS = ("0", "-0.0", "1", "0.5", "-1", "nan", "inf", "-inf", "1e999", "1e308", "1e-320", "1_0.5", "0x1p3",
          "9" * 5000, "infinity", "٣.٥", "1,5", "1e", ".", "1e9")  # fmt: skip
TEXTS = ("", " ", "\t\n", "x" * 100_000, "é\u202e\u2066", "\x1b[31m", "a\nb", "\udcff\udcfe", "\ud800", "-", "--", "-x",
         "{rollout_id}", "{", "%s", "None", "true", "[0]*1+[1]*45", "ﬀ", "\u0000", "'\"`$(true)", "[" * 5000,
         "(" * 5000, "[0]" + "+[0]" * 30_000, "[0]" + "*1" * 30_000, "[0]*9999*9999", "[9" + "9" * 5000 + "]",
         "deepscaler", "boxed_" * 3000, "http://[", "http://x:99999/", "http://" + "a" * 5000, "1 2")  # fmt: skip
PATH_FLAGS = ("hf_checkpoint", "ref_load", "load", "save", "prompt_data", "eval_prompt_data", "eval_config", "config",
              "log_dir", "tensorboard_dir", "save_hf", "save_debug_rollout_data", "load_debug_rollout_data",
              "save_debug_train_data", "update_weight_disk_dir", "critic_load", "rm_url")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The outcome of a line. `kind`: plan, message, traceback, hang, silence, unreadable, long or exit."""

    kind: str
    text: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.kind in ("plan", "message")


class TooLongError(BaseException):
    """The line took too long. It is a BaseException, so that no rule catches it."""


class HostileLines:
    """Makes the hostile files in the empty `folder`, and then any number of lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        good = folder / "good"
        good.mkdir()
        self._hf_good = files.write_hf(good / "hf")
        self._data_good = files.write_prompts(good / "train.jsonl")
        self.hf = [str(path) for path in files.hf_directories(folder)]
        prompts = files.prompt_files(folder)
        self.prompts = [str(path) for path in prompts]
        self.yaml = [str(path) for path in files.yaml_files(folder)]
        self.eval = [str(path) for path in files.eval_files(folder, prompts)]
        self.hooks = files.hook_paths(folder)
        self.special = files.special_paths(folder)
        self.flags = [spec for spec in all_flags() if spec.name != "help"]

    @property
    def base(self) -> list[str]:
        """Return a valid line."""
        return [
            *("--hf-checkpoint", self._hf_good, "--ref-load", self._hf_good, "--prompt-data", self._data_good),
            *("--rollout-engine", "embedded", "--rollout-num-gpus", "2", "--label-key", "label", "--no-bf16"),
            *("--apply-chat-template", "--rm-type", "deepscaler", "--num-rollout", "3", "--rollout-batch-size", "4"),
            *("--n-samples-per-prompt", "2", "--rollout-max-response-len", "40"),
            *("--log-dir", str(self.folder / "good" / "logs")),
        ]

    def line(self, seed: int) -> list[str]:
        """Return the valid line after one to four changes that make it wrong, or unusual."""
        draw = random.Random(seed)
        words = self.base
        for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
            words += self._fault(draw)
        if draw.random() < 0.5:
            words.append("--dry-run")
        if draw.random() < 0.03:
            words = words[: draw.randrange(len(words))]
        if draw.random() < 0.03:
            draw.shuffle(words)
        return words

    def _fault(self, draw: random.Random) -> list[str]:
        kind = draw.random()
        if kind < 0.12:
            return [
                "--hf-checkpoint",
                path := draw.choice(self.hf),
                *(["--ref-load", path] if draw.random() < 0.5 else []),
            ]
        if kind < 0.24:
            return self._prompts(draw)
        if kind < 0.32:
            return ["--config", draw.choice(self.yaml)]
        if kind < 0.36:
            return ["--eval-config", draw.choice(self.eval), "--eval-interval", "1"]
        if kind < 0.44:
            name = draw.choice([*HOOKS, "spec"])
            path = draw.choice(self.hooks)
            spec = path.rpartition(".")[::2] if name == "spec" else (path,)
            return ["--" + name.replace("_", "-"), *spec]
        if kind < 0.52:
            return [
                "--" + draw.choice(PATH_FLAGS).replace("_", "-"),
                draw.choice(self.special + self.hf + self.prompts),
            ]
        if kind < 0.56:
            return [
                draw.choice((*TEXTS, *INTEGERS, "--" + draw.choice(TEXTS), "--" + draw.choice(TEXTS) + "=1", "--=x"))
            ]
        return self._flag(draw, draw.choice(self.flags))

    def _prompts(self, draw: random.Random) -> list[str]:
        path = draw.choice(self.prompts) + draw.choice(("", "", "@[:]", "@[-1:]", "@[5:2]", f"@[:{10**30}]", "@[1:1]"))
        flag = draw.choice(("--prompt-data", "--prompt-data", "--eval-prompt-data"))
        words = [flag, path, *(["--eval-interval", "1"] if flag == "--eval-prompt-data" else [])]
        words += ["--no-apply-chat-template"] if draw.random() < 0.6 else []
        words += ["--tool-key", "tools"] if draw.random() < 0.3 else []
        words += ["--num-epoch", "1"] if draw.random() < 0.2 else []
        return words

    def _flag(self, draw: random.Random, spec: FlagSpec) -> list[str]:
        spelling = draw.choice(spec.on + spec.off)
        count = draw.choice((0, 1, 1, 1, 1, 1, 1, 1, 2, 3))
        values = [self._value(draw, spec) for _ in range(count)]
        if spec.kind == "bool" and draw.random() < 0.7:
            values = []
        if draw.random() < 0.15 and values:
            return [f"{spelling}={values[0]}", *values[1:]]
        return [spelling, *values] * draw.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 50))

    def _value(self, draw: random.Random, spec: FlagSpec) -> str:
        kind = draw.random()
        if kind < 0.1:
            return draw.choice((*TEXTS, *self.special))
        if spec.choices and kind < 0.6:
            return draw.choice(spec.choices)
        if spec.kind == "int":
            return draw.choice(INTEGERS)
        if spec.kind == "float":
            return draw.choice(FLOATS)
        return draw.choice((*TEXTS, *self.special, *self.hooks))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the main thread after `seconds`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plan(words: list[str]) -> str:
    """Return the text that train.py prints about these words before it starts anything."""
    return format_plan(*load_run(words))


def outcome(words: list[str], limit: float = LIMIT, say: Callable[[list[str]], str] = plan) -> Outcome:
    """Run a line, and return its outcome."""
    start = time.monotonic()

    def found(kind: str, text: str) -> Outcome:
        return Outcome(kind, text, time.monotonic() - start)

    shown = io.StringIO()
    try:
        with within(limit), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            try:
                text, kind = say(words), "plan"
            except UsageError as error:
                text, kind = str(error), "message"
    except TooLongError:
        return found("hang", traceback.format_exc(limit=-6))
    except SystemExit as error:
        return found("plan" if "usage: " in shown.getvalue() else "exit", str(error))
    except Exception:  # noqa: BLE001 (whatever it is, it is what the test looks for)
        return found("traceback", traceback.format_exc(limit=-6))
    return found(_fault_of(text) or kind, text)


def _fault_of(text: str) -> str | None:
    """Return why a user cannot read the message, or None if the message is fine."""
    if not text.strip():
        return "silence"
    if any(not (character.isprintable() or character == "\n") for character in text):
        return "unreadable"
    return "long" if len(text) > LONGEST_MESSAGE else None
