"""The parser of argv and YAML. It returns frozen Args, or raises one UsageError that lists all errors.

- Used by: train.py and the tools, which call `load_args`. Afterwards `resolve` fills in open values and `rules` checks.
- Invariant: no given flag is dropped silently, and no process is started before an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, cast

from slime.config.architecture import resolve_architecture
from slime.config.args import Args, FrozenMapping
from slime.config.args_yaml import dump_args
from slime.config.flags.renamed import REMOVED, RENAMED, TABLE_VERSION
from slime.config.flags.synonyms import absent, misspelt, shortened, synonym
from slime.config.flags.table import SET_BY_SLIME, FlagSpec, Source, spellings, taken_back
from slime.config.help import format_help, show_help
from slime.config.problem import MAX_SHOWN, Problem, UsageError, show
from slime.config.resolve import resolve
from slime.config.rules.check import CONVERSION_RULES, TRAINING_RULES, Case, check, parallel_sizes
from slime.config.rules.experts import experts
from slime.config.rules.optimizer import decay, warm_up
from slime.config.secrets import from_environment, masked, secret_values
from slime.config.sharding import resolve_sharding
from slime.config.values import BOOLEANS, from_texts, from_yaml
from slime.config.yaml_files import read_yaml_file
from slime.core.masking import HIDDEN, Masker

__all__ = ["UsageError", "dump_args", "load_args", "parse_args"]

MEGATRON_LOOP: Mapping[str, str] = {
    "--train-iters": "use --num-rollout (and --num-steps-per-rollout)",
    "--train-samples": "use --num-rollout and --rollout-batch-size",
    "--lr-decay-samples": "use --lr-decay-iters",
    "--lr-warmup-samples": "use --lr-warmup-iters",
    "--lr-wsd-decay-samples": "use --lr-wsd-decay-iters",
    "--data-path": "use --prompt-data",
    "--tokenizer-type": "the tokenizer comes from --hf-checkpoint",
    "--tokenizer-model": "the tokenizer comes from --hf-checkpoint",
    "--eval-iters": "use --eval-interval and --eval-prompt-data",
}
"""Flags of Megatron's own training loop, and what to use instead."""

MAX_SPELLING = 100
"""The largest number of characters in an unknown flag for which a similar known one is searched."""


YAML_SUFFIXES = (".yaml", ".yml")


@dataclass
class Given:
    """The flags that were given, before anything is resolved."""

    values: dict[tuple[Source, str], Any] = field(default_factory=dict[tuple[Source, str], Any])
    problems: list[Problem] = field(default_factory=list[Problem])
    broken: set[str] = field(default_factory=set[str])
    """Fields whose value could not be parsed; problems of rules that read them are not reported."""
    typed: set[str] = field(default_factory=set[str])
    """The names of slime's flags that were given on the command line itself."""
    taken_back: set[str] = field(default_factory=set[str])
    """The names of slime's flags whose earlier value was taken back: --no-rollout-num-gpus."""
    renamed: dict[str, str] = field(default_factory=dict[str, str])
    """For flags of SGLang with several names, the name that was given."""

    def complain(self, where: str, rule: str, remedy: str, *, value: str = "", spec: FlagSpec | None = None) -> None:
        """Add an error, and remember that the field of `spec` is broken."""
        fields = frozenset([spec.name]) if spec else frozenset[str]()
        self.broken |= fields
        value = masked(spec and spec.secret, value)
        self.problems.append(
            Problem(severity="error", where=where, value=value, rule=rule, remedy=remedy, fields=fields)
        )

    def set(self, spec: FlagSpec, value: Any, where: str) -> None:
        """Set a flag's value, or add an error if slime sets this flag itself."""
        reason = SET_BY_SLIME.get((spec.source, spec.name))
        if reason is not None:
            self.complain(where, "slime sets it itself", reason, value=show(value))
            return
        self.values[spec.source, spec.name] = value
        self.taken_back.discard(spec.name)

    def take_back(self, spec: FlagSpec) -> None:
        """Let a flag count as not given, also if --config gives it."""
        self.values[spec.source, spec.name] = spec.default
        self.taken_back.add(spec.name)

    def of(self, source: Source) -> dict[str, Any]:
        """Return the given values of one source by field name."""
        return {name: value for (owner, name), value in self.values.items() if owner == source}

    def under_new_name(self, spelling: str, where: str) -> str:
        """Return the current name of a flag of SGLang, and report an error if it is given under several names."""
        new = RENAMED[spelling].flag if spelling in RENAMED else spelling
        before = self.renamed.setdefault(new, spelling)
        if spelling != before and {spelling, before} & set(RENAMED):
            self.complain(where, f"is another name of {before}, which is also given", f"give only {new}")
        return new


def _unknown(given: Given, spelling: str, where: str) -> None:
    known = spellings()
    if spelling in REMOVED:
        given.complain(where, f"SGLang {TABLE_VERSION} no longer has this flag", REMOVED[spelling])
        return
    if spelling in MEGATRON_LOOP:
        given.complain(where, "slime's loop counts rollouts and has no such flag", MEGATRON_LOOP[spelling])
        return
    close = synonym(spelling)
    if close is None and len(spelling) <= MAX_SPELLING and len(given.problems) <= MAX_SHOWN:  # the search is slow
        close = misspelt(spelling, known)
    missing = absent(spelling)
    if close is None and missing is not None:
        given.complain(where, *missing)
        return
    close = close or shortened(spelling, known)
    spec = known[close][0] if close else None
    remedy = f"did you mean {close}?" if close else "--help names slime's flags, --help all every flag"
    given.complain(where, "unknown flag", remedy, spec=spec)


def _set_from_words(given: Given, spelling: str, words: list[str], attached: bool) -> None:
    """Set one flag of the command line from the words after it (`attached`: written as --x=word)."""
    old = RENAMED.get(spelling)
    name = given.under_new_name(spelling, spelling)
    back = taken_back(name)
    if name not in spellings() and back is not None:
        if words:
            remedy = f"write {spelling}, which takes an earlier {back.flag} back"
            given.complain(spelling, "takes no value", remedy, value=" ".join(words), spec=back)
        given.take_back(back)
        return
    if name not in spellings():
        _unknown(given, spelling, spelling)
        return
    spec, switches_on = spellings()[name]
    if old is not None and old.value is not None:
        if words:
            given.complain(spelling, "takes no value", f"write {old.flag} {old.value}", value=" ".join(words))
            return
        words = [old.value]
    elif old is not None:
        words = [old.values.get(word, word) for word in words]
    text = " ".join(words)
    if spec.kind == "bool":
        if attached and text.lower() in BOOLEANS:
            given.set(spec, BOOLEANS[text.lower()] == switches_on, spelling)
        elif words:
            off = f" or {spec.off[0]}" if spec.off else ""
            given.complain(spelling, "takes no value", f"write {spec.flag}{off}", value=text, spec=spec)
        else:
            given.set(spec, switches_on, spelling)
        return
    try:
        value = from_texts(spec, from_environment(words) if spec.secret else words)
    except ValueError as error:
        missing = absent(text) if spec.choices else None
        remedy = f"it means: {spec.help}" if missing is None else ": ".join(missing)
        given.complain(spelling, f"must be {error}", remedy, value=text or "(nothing)", spec=spec)
        return
    given.set(spec, value, spelling)


def read_command_line(given: Given, argv: Sequence[str]) -> None:
    """Read flags of the forms --x v, --x v w, --x=v, --x and --no-x; the last of a repeated flag wins.

    For a flag with a value, --no-x takes earlier values back, also that of --config.

    If the first word names a YAML file, it is the value of --config: `run.yaml --lr 2e-6`.
    """
    words = list(argv)
    if words and words[0].endswith(YAML_SUFFIXES) and not words[0].startswith("--"):
        if any(word.partition("=")[0] == "--config" for word in words):
            given.complain(words[0], "is a configuration file, and --config names another", "give one of the two")
        words.insert(0, "--config")
    while words and not words[0].startswith("--"):
        given.complain(repr(words.pop(0)), "does not follow a flag", "put it after a flag that starts with --")
    while words:
        spelling, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while words and not equals and not words[0].startswith("--"):
            values.append(words.pop(0))
        while equals and words and not words[0].startswith("--"):
            spec = spellings()[spelling][0] if spelling in spellings() else None
            word = words.pop(0)
            shown = HIDDEN if spec is not None and spec.secret else repr(word)
            given.complain(shown, "does not follow a flag", f"{spelling}= takes one value")
        _set_from_words(given, spelling, values, attached=bool(equals))


def read_yaml(given: Given, path: str) -> None:
    """Read flags from a flat YAML mapping: names with dashes or underscores, each flag once."""
    try:
        data = read_yaml_file(path)
    except ValueError as error:
        given.complain("--config", str(error), "name a YAML file with flags as keys", value=path)
        return
    if not isinstance(data, dict):
        given.complain("--config", "is not a mapping", "write one `flag: value` per line", value=path)
        return
    for key, value in cast(dict[Any, Any], data).items():
        spelling = "--" + str(key).replace("_", "-")
        where = f"{path}: {key}"
        name, old = given.under_new_name(spelling, where), RENAMED.get(spelling)
        if name not in spellings():
            _unknown(given, spelling, where)
            continue
        if old is not None and old.value is not None:
            if value is not True:
                given.complain(where, "is a switch that now has another name", f"write {old.flag[2:]}: {old.value}")
                continue
            value = old.value
        elif old is not None:
            value = old.values.get(value, value) if isinstance(value, str) else value
        spec, switches_on = spellings()[name]
        if spec.name == "config" and spec.source == "slime":
            given.complain(where, "a configuration file cannot name another", "give one --config")
            continue
        if (spec.source, spec.name) in given.values:
            given.complain(where, f"{spec.flag} is given twice, spelled differently", "leave one of the two out")
            continue
        try:
            typed = from_yaml(spec, from_environment(value) if spec.secret else value)
        except ValueError as error:
            shown = f"[{', '.join(map(str, cast(list[Any], value)))}]" if isinstance(value, list) else str(value)
            given.complain(where, f"must be {error}", f"it means: {spec.help}", value=shown, spec=spec)
            continue
        given.set(spec, typed == switches_on if spec.kind == "bool" and typed is not None else typed, where)


def read(argv: Sequence[str]) -> Given:
    """Read the command line and --config; the command line wins."""
    from_argv = Given()
    read_command_line(from_argv, argv)
    path = from_argv.values.get(("slime", "config"))
    given = Given()
    if path is not None:
        read_yaml(given, path)
    given.values |= from_argv.values
    for name in from_argv.taken_back:
        del given.values["slime", name]
    given.typed = set(from_argv.of("slime")) - from_argv.taken_back
    given.problems += from_argv.problems
    given.broken |= from_argv.broken
    return given


def _given_names(given: Given, raw: Args) -> frozenset[str]:
    """Return the names of slime's flags that count as given.

    A YAML value that equals the value resolved without it does not count. So `--config args.yaml`, which has a value
    for every flag, does not lead to warnings about flags without effect.
    """
    defaults = vars(Args())
    names = set(given.typed)
    for name, value in given.of("slime").items():
        if vars(resolve(replace(raw, **{name: defaults[name]})))[name] != value:
            names.add(name)
    return frozenset(names)


def _asked_help(argv: Sequence[str]) -> list[str] | None:
    """Return the sections after --help or -h, which may be none; None if there is no --help."""
    for place, word in enumerate(argv):
        if word in ("--help", "-h"):
            return list(takewhile(lambda name: not name.startswith("-"), argv[place + 1 :]))
        if word.startswith("--help="):
            return [word.partition("=")[2]]
    return None


def _print_help(names: Sequence[str]) -> None:
    """Print the help of these sections, or the overview.

    Raises:
        UsageError: there is no section with such a name.
    """
    try:
        text = format_help(names)
    except ValueError as error:
        remedy = "name one of them, or none for an overview"
        problem = Problem(severity="error", where="--help", value=" ".join(names), rule=str(error), remedy=remedy)
        raise UsageError([problem]) from None
    show_help(text)


def _no_more(args: Args, problems: Sequence[Problem]) -> list[Problem]:
    return []


def load_args(
    argv: Sequence[str],
    *,
    training: bool = True,
    rollouts_ahead: int = 0,
    more: Callable[[Args, Sequence[Problem]], list[Problem]] = _no_more,
) -> tuple[Args, list[Problem]]:
    """Return the resolved Args and the warnings. `--help` prints the flags and exits.

    `training=False`: for tools that need only the model and the parallel sizes; rules for rollouts, rewards and
    placement are skipped. `rollouts_ahead`: 0 for train.py, 1 for train_async.py. `more` returns further problems of
    the resolved Args, given those of the rules.

    Raises:
        UsageError: all errors at once.
    """
    sections = _asked_help(argv)
    if sections is not None:
        _print_help(sections)
        raise SystemExit(0)
    given = read(argv)
    raw = Args(
        **given.of("slime"),
        megatron_extra=FrozenMapping(given.of("megatron")),
        sglang=FrozenMapping(given.of("sglang")),
        router=FrozenMapping(given.of("router")),
        rollouts_ahead=rollouts_ahead,
    )
    args, problems = resolve_architecture(resolve(raw))
    args = resolve_sharding(args)
    case = Case(args=args, given=_given_names(given, raw))
    problems += check(case, TRAINING_RULES if training else CONVERSION_RULES)
    problems = given.problems + [problem for problem in problems if not problem.fields & given.broken]
    problems += more(args, problems)
    masker = Masker(secret_values(given.values))
    problems = [problem.masked(masker) for problem in problems]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise UsageError(errors)
    return args, problems


def parse_args(argv: Sequence[str]) -> Args:
    """Return the Args of `load_args` without the warnings."""
    return load_args(argv)[0]


def schedule_problems(args: Args) -> list[Problem]:
    """Return the problems of the learning rate's schedule, if the number of rollouts is known only after the start."""
    case = Case(args=args, given=frozenset())
    return [*decay(case), *warm_up(case)]


def parallel_problems(args: Args) -> list[Problem]:
    """Return the problems of the parallel sizes, for sizes that a plan proposes."""
    case = Case(args=args, given=frozenset())
    return [*parallel_sizes(case), *experts(case)]
