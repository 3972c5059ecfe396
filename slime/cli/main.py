"""The command `slime`: find the command that the first word names, and run it with the other words.

- Called by: the console script `slime` and `python -m slime`; tools/ call `run_command`.
- Invariant: only the module of the chosen command is imported, so `slime --help` needs nothing that is heavy.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from slime import __version__
from slime.config.help import show_help
from slime.core.errors import RunError
from slime.core.printable import PLACE, printable


@dataclass(frozen=True)
class Command:
    """A command: the module under `slime.cli` that runs it, what it does, and one example."""

    module: str
    summary: str
    example: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Command("train", "train a model", "slime train run.yaml --lr 2e-6"),
        "train-async": Command(
            "train_async", "train while the next rollout is generated", "slime train-async run.yaml"
        ),
        "plan": Command("plan", "print what a run would do, and stop", "slime plan run.yaml"),
        "eval": Command("eval", "evaluate without training", "slime eval run.yaml --hf-checkpoint HF_DIR"),
        "convert": Command("convert", "HF directory -> torch_dist", "slime convert --hf-checkpoint HF_DIR --save OUT"),
        "export": Command(
            "export",
            "torch_dist -> HF directory",
            "slime export --input-dir RUN --origin-hf-dir HF_DIR --output-dir OUT",
        ),
        "plot": Command("plot", "draw the curves of a run", "slime plot RUN"),
        "answers": Command(
            "answers",
            "show answers of two models side by side",
            "slime answers --before HF_DIR --after HF_DIR --prompt-data eval.jsonl",
        ),
        "demo": Command("demo", "teach a tiny model to add, on a CPU", "slime demo"),
    }
)


def format_commands() -> str:
    """Return the text of `slime --help`, which fits on one screen of 80 x 24."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    shown = ("demo", "plan", "train", "export")
    return "\n".join(
        [
            "usage: slime COMMAND ...",
            "",
            *lines,
            "",
            *(f"  $ {COMMANDS[name].example}" for name in shown),
            "",
            "slime COMMAND --help describes a command; slime train --help lists the flags.",
            "slime --version prints the version. `python -m slime` is the same program.",
        ]
    )


def find_command(name: str) -> Command:
    """Return the command with this name.

    Raises:
        ValueError: there is none; the message names a similar one, and all.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    remedy = f"did you mean {close[0]}? " if close else ""
    shown = printable(name, PLACE)
    raise ValueError(f"{shown}: no such command; {remedy}the commands are {', '.join(COMMANDS)}")


def run_command(program: str, main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Run a command's `main`, and turn an error of the user's into one message and the exit status 1.

    Raises:
        SystemExit: with the message, which begins with `program`.
    """
    try:
        main(argv)
    except (OSError, ValueError, RunError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` names; the default is the command line of this process."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("--help", "-h", "help"):
        show_help(format_commands())
    elif words[0] in ("--version", "-V"):
        print(f"slime {__version__}")
    else:
        run_command("slime", lambda rest: _main_of(words[0])(rest), words[1:])


def _main_of(name: str) -> Callable[[Sequence[str]], None]:
    """Import and return the function `main` of a command."""
    module = find_command(name).module
    return import_module(f"slime.cli.{module}").main
