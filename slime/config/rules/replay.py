"""The rule about a replay: the dump was sampled as training assumes.

Path: part of `rules`; `config.sampling_record` says what is compared. Invariant: what is refused is refused before
anything starts, all of it in one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem
from slime.config.sampling_record import read_record
from slime.core.small_files import is_file

MOST_FILES = 1000
"""Files looked at before the start; the rollout manager looks at each one again when its turn comes."""
FIELD = "load_debug_rollout_data"


def replay(case: Case) -> Iterable[Problem]:
    """--load-debug-rollout-data names dumps of this tokenizer, sampled from the distribution that is trained on."""
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
        rule = f"training takes log-probs of the whole softmax at --rollout-temperature: {'; '.join(wrong)}"
        remedy = "replay samples of that distribution and tokenizer"
        yield case.error(FIELD, rule, remedy, beside=about)
    if silent:
        rule = (
            f"{_named(silent)} does not say how it was sampled: temperature, top-p, top-k and tokenizer are not checked"
        )
        remedy = "see that they are this run's, or dump it again"
        yield case.warning(FIELD, rule, remedy)


def _dumps(pattern: str, num_rollout: int | None) -> Iterator[Path]:
    """The files that are there."""
    try:
        names = dict.fromkeys(pattern.format(rollout_id=i) for i in range(min(num_rollout or MOST_FILES, MOST_FILES)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        return  # another rule's error
    yield from (Path(name) for name in names if is_file(name))


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"
