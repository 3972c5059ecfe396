"""The rule for --load-debug-rollout-data: the dump was sampled as training assumes.

- Used by: `rules.check`; `config.sampling_record` defines what is compared.
- Invariant: dumps are refused before anything starts, all in one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from slime.config.problem import Problem
from slime.config.rules.case import Case
from slime.config.sampling_record import read_record
from slime.core.small_files import is_file

MOST_FILES = 1000
"""The largest number of files checked before the start. The rollout manager checks each file again when it loads it."""
FIELD = "load_debug_rollout_data"


def replay(case: Case) -> Iterable[Problem]:
    """Check that the dumps use the run's tokenizer and were sampled from the distribution that is trained on."""
    args = case.args
    if args.load_debug_rollout_data is None or args.debug_rollout_only or args.num_rollout == 0:
        return
    silent: list[Path] = []
    found: dict[str, list[Path]] = {}
    for path in _dumps(args.load_debug_rollout_data, args.num_rollout):
        try:
            record = read_record(path)
        except (OSError, ValueError) as error:
            yield case.error(FIELD, str(error), "name files that --save-debug-rollout-data wrote")
            return
        if record is None:
            silent.append(path)
        else:
            found.setdefault("; ".join(record.faults(args)), []).append(path)
    about = ("rollout_temperature", "hf_checkpoint", "loss_type")
    wrong = [f"{_named(paths)}: {faults}" for faults, paths in found.items() if faults]
    if wrong:
        rule = f"training computes log-probs of the whole softmax at --rollout-temperature: {'; '.join(wrong)}"
        remedy = "replay samples of this distribution and tokenizer"
        yield case.error(FIELD, rule, remedy, also=about)
    if silent:
        rule = f"{_named(silent)} does not record its sampling: temperature, top-p, top-k and tokenizer are not checked"
        remedy = "make sure that they match this run, or dump it again"
        yield case.warning(FIELD, rule, remedy)


def _dumps(pattern: str, num_rollout: int | None) -> Iterator[Path]:
    """Yield the dump files that exist."""
    try:
        names = dict.fromkeys(pattern.format(rollout_id=i) for i in range(min(num_rollout or MOST_FILES, MOST_FILES)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        return  # another rule's error
    yield from (Path(name) for name in names if is_file(name))


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"
