"""The rule for paths of a run that `ray job submit --working-dir` has started.

- Used by: `rules.check`.
- Invariant: nothing is written where Ray removes it. Relative inputs are allowed: they may be in the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slime.config.problem import Problem
from slime.config.ray_job import in_a_package
from slime.config.rules.case import Case
from slime.config.rules.paths import WRITTEN

_OUTPUTS = (*WRITTEN, "save_debug_train_data")


def job_outputs(case: Case) -> Iterable[Problem]:
    """Refuse relative paths of outputs in the package of a job, which Ray removes some time after the job."""
    if not in_a_package():
        return
    rule = "a job's own folder is Ray's temporary copy of --working-dir, in which outputs would be lost"
    remedy = "give the whole path, such as /data/{}; on several nodes a place that all of them share"
    for field in _OUTPUTS:
        path: str | None = vars(case.args)[field]
        if path is not None and field in case.given and not Path(path).is_absolute():
            yield case.error(field, rule, remedy.format(Path(path).name))
