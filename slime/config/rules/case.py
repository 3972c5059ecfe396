"""`Case`: the input of every rule, with the methods by which rules report problems; and a row of the no-effect table.

- Used by: `parse`, which makes one, and `check`, which passes it to every rule.
- Invariant: rules only read; they never change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from slime.config.args import Args
from slime.config.flags.table import spellings
from slime.config.problem import Problem, Severity, flag_name, show
from slime.config.secrets import masked


@dataclass(frozen=True)
class Case:
    """The resolved Args and the names of slime's own flags that were given."""

    args: Args
    given: frozenset[str]

    @property
    def real(self) -> bool:
        """Return whether the run starts processes; a --dry-run only plans."""
        return not self.args.dry_run

    @property
    def generates(self) -> bool:
        """Return whether training samples come from engines through slime's own rollout function."""
        args = self.args
        trains = not args.debug_train_only and args.num_rollout != 0
        return args.has_usual_rollout and trains and args.load_debug_rollout_data is None

    @property
    def evaluates(self) -> bool:
        """Return whether there is data to evaluate on."""
        return bool(self.args.eval_prompt_data or self.args.eval_config)

    @property
    def trains_policy(self) -> bool:
        """Return whether the run trains the policy with the policy loss."""
        return self.args.loss_type == "policy_loss" and not self.args.debug_rollout_only and self.args.num_rollout != 0

    def _problem(self, severity: Severity, field: str, rule: str, remedy: str, also: Iterable[str]) -> Problem:
        value: Any = vars(self.args)[field]
        where = flag_name(f"no_{field}") if value is False else flag_name(field)
        fields = frozenset([field, *also])
        shown = masked(spellings()[flag_name(field)][0].secret, show(value))
        return Problem(severity=severity, where=where, value=shown, rule=rule, remedy=remedy, fields=fields)

    def error(self, field: str, rule: str, remedy: str, *, also: Iterable[str] = ()) -> Problem:
        """Return an error about `field`.

        `also`: other fields that the rule reads. If one of them could not be parsed, the error is not reported.
        """
        return self._problem("error", field, rule, remedy, also)

    def warning(self, field: str, rule: str, remedy: str, *, also: Iterable[str] = ()) -> Problem:
        """Return a warning about `field`; `also` as in `error`."""
        return self._problem("warning", field, rule, remedy, also)

    def missing(self, field: str, rule: str, remedy: str) -> Problem:
        """Return a problem that is an error in a real run and a warning in a --dry-run."""
        return self._problem("error" if self.real else "warning", field, rule, remedy, ())


Rule = Callable[[Case], Iterable[Problem]]


@dataclass(frozen=True)
class NoEffect:
    """`fields` have no effect if `when` returns True; `why` completes the text "no effect: ..."."""

    fields: tuple[str, ...]
    when: Callable[[Args], bool]
    why: str
    remedy: str = "leave it out"
