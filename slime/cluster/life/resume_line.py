"""The command that continues a run which a signal has ended, made from the run's own command line.

- Used by: `main`, when a run ends because of a signal.
- Invariant: secrets are masked, as everywhere else.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slime.config.args import Args
from slime.config.flags.table import spellings
from slime.config.ray_job import in_a_job
from slime.config.secrets import masked_words

REPLACED = ("load", "ckpt_step", "finetune", "no_load_optim", "no_load_rng")
"""Flags that say where a run begins."""


def command_to_resume(argv: Sequence[str], args: Args, newest: int | None, program: Sequence[str]) -> str:
    """Return the lines that tell how to continue after the checkpoint of rollout `newest`, or to start again if None.

    `argv` are the flags as they were given, after the words of the `program`.
    """
    words = list(argv) if newest is None else _resuming(argv, args, newest)
    shown = masked_words(words)
    hidden = [name for name in map(_flag_before(words).get, _changed(words, shown)) if name]
    job = ", submitted as before (`ray job submit ... --`)" if in_a_job() else ""
    lines = [f"{'start again' if newest is None else 'resume'} with{job}:", shlex.join([*program, *shown])]
    if hidden:
        lines.append(f"*** replaces the secrets: give {', '.join(dict.fromkeys(hidden))} again, as is or as env:NAME")
    return "\n".join(lines)


def program_words(argv: Sequence[str], fallback: str) -> list[str]:
    """Return the words before `argv` on this process's command line; `fallback` is the command of slime otherwise.

    >>> program_words([], "train")[-2:]
    ['slime', 'train']
    """
    words = sys.orig_argv
    count = len(words) - len(argv)
    if not argv or count < 2 or words[count:] != masked_words(argv):
        return [sys.executable, "-m", "slime", fallback]
    before = words[:count]
    script = Path(before[1])
    if script.name == "slime" and script.is_file():  # the console script, which the shell has found
        found = shutil.which("slime")
        same = found is not None and Path(found).resolve() == script.resolve()
        return ["slime" if same else str(script), *before[2:]]
    return before


def _resuming(argv: Sequence[str], args: Args, newest: int) -> list[str]:
    """Return the words that load the run's own newest checkpoint, wherever the run began (see `resumed_args`)."""
    assert args.save is not None, "there is a checkpoint"
    kept: list[str] = []
    given: set[str] = set()
    keep = True
    for word in argv:
        if word.startswith("--"):
            spelling = word.partition("=")[0]
            name = spellings()[spelling][0].name if spelling in spellings() else ""
            given.add(name)
            keep = name not in REPLACED
        if keep:
            kept.append(word)
    kept += [] if "save" in given else ["--save", args.save]
    kept += ["--load", args.save]
    # Those below may be in a YAML file, which the words after it override.
    kept += [] if args.ckpt_step is None else ["--ckpt-step", str(newest)]
    kept += ["--no-finetune"] if args.finetune else []
    kept += ["--no-load-optim"] if args.no_save_optim else ["--load-optim"] if args.no_load_optim else []
    return kept + (["--load-rng"] if args.no_load_rng else [])


def _changed(words: Sequence[str], shown: Sequence[str]) -> list[int]:
    return [place for place, (word, its) in enumerate(zip(words, shown, strict=True)) if word != its]


def _flag_before(words: Sequence[str]) -> Mapping[int, str]:
    """Return the flag that each word belongs to, by the word's place."""
    flags: dict[int, str] = {}
    flag = ""
    for place, word in enumerate(words):
        flag = word.partition("=")[0] if word.startswith("--") else flag
        flags[place] = flag
    return flags
