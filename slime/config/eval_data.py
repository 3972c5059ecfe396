"""The evaluation sets from --eval-prompt-data and --eval-config, each with its sampling parameters.

- Used by: `rules`, which checks the files, and `rollout.evaluate`, which evaluates the sets.
- Invariant: every value of an EvalDataset is resolved.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.config.flags.table import FlagSpec, all_flags
from slime.config.values import from_yaml
from slime.config.yaml_files import read_yaml_file


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """One evaluation set. Each path may end in a slice; the sampling fields have the meaning of the eval flags."""

    name: str
    path: str | tuple[str, ...]
    input_key: str
    label_key: str | None
    rm_type: str | None
    n_samples_per_eval_prompt: int
    max_response_len: int
    temperature: float
    top_p: float
    top_k: int
    failed_as: str = "wrong"
    metadata_key: str = "metadata"
    tool_key: str | None = None
    apply_chat_template: bool = False
    system_prompt: str | None = None
    apply_chat_template_kwargs: str | None = None
    loss_on: Literal["all_assistant", "last_assistant"] | None = None
    """The assistant's messages to learn from (see `DataKeys`): a flag of the run, not a key in --eval-config."""

    @property
    def keys(self) -> DataKeys:
        """Return the keys of its rows."""
        return DataKeys(
            input_key=self.input_key,
            label_key=self.label_key,
            metadata_key=self.metadata_key,
            tool_key=self.tool_key,
            loss_on=self.loss_on,
        )

    @property
    def pass_at_ks(self) -> list[int]:
        """Return the k for which pass@k is reported: powers of two and the number of samples; none for one sample."""
        num_samples = self.n_samples_per_eval_prompt
        powers = [2**exponent for exponent in range(num_samples.bit_length()) if 2**exponent < num_samples]
        return [*powers, num_samples] if num_samples > 1 else []


def _defaults(args: Args) -> dict[str, Any]:
    """Return the values of the resolved flags, which a set in --eval-config may override one by one."""
    sampling = ("max_response_len", "temperature", "top_p", "top_k")
    inherited = ("input_key", "label_key", "rm_type", *sampling, "failed_as")
    values = {name: vars(args)[f"eval_{name}"] for name in inherited}
    shared = ("metadata_key", "tool_key", "apply_chat_template", "system_prompt", "apply_chat_template_kwargs")
    values |= {name: vars(args)[name] for name in shared}
    values["apply_chat_template"] = bool(args.apply_chat_template)
    return values | {
        "n_samples_per_eval_prompt": args.n_samples_per_eval_prompt,
        "loss_on": args.loss_on if args.validates else None,
    }


def eval_datasets(args: Args) -> list[EvalDataset]:
    """Return all evaluation sets, those of --eval-prompt-data first.

    Raises:
        ValueError: an odd number of words, two sets with the same name, or a malformed --eval-config.
    """
    defaults = _defaults(args)
    sets = [EvalDataset(name=name, path=path, **defaults) for name, path in _named_paths(args.eval_prompt_data)]
    if args.eval_config is not None:
        sets += [_from_yaml(entry, defaults, args.eval_config) for entry in _yaml_entries(args.eval_config)]
    names = [dataset.name for dataset in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"two evaluation sets have the same name ({', '.join(names)}); give each its own")
    return sets


def readable_eval_datasets(args: Args) -> list[EvalDataset]:
    """Return all evaluation sets; none if they cannot be read, which is another rule's error."""
    try:
        return eval_datasets(args)
    except ValueError:
        return []


def sets_with_rm_type(args: Args) -> list[str]:
    """Return the names of the sets in --eval-config with their own rm_type. Call it after `eval_datasets`."""
    if args.eval_config is None:
        return []
    entries = cast(list[dict[Any, Any]], _yaml_entries(args.eval_config))  # `eval_datasets` has checked the types
    named = [_by_name(entry, args.eval_config) for entry in entries]
    return [str(entry["name"]) for entry in named if entry.get("rm_type")]


def _named_paths(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return pairs of name and path. A single path is named after its file; a pattern, after the folder before it."""
    if len(words) == 1:
        file = Path(words[0].partition("@[")[0])
        names = [file.stem, *reversed(file.parent.parts)]
        return [(next((name for name in names if not set(name) & set("*?[")), "eval"), words[0])]
    if len(words) % 2:
        raise ValueError(f"{len(words)} words; give one path, or NAME PATH pairs")
    return list(zip(words[::2], words[1::2], strict=True))


def _yaml_entries(path: str) -> list[Any]:
    try:
        data = read_yaml_file(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}; name a YAML file") from error
    entries = cast(dict[str, Any], data).get("datasets") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list `datasets`; write one entry with name and path for each set")
    if others := [str(key) for key in cast(dict[Any, Any], data) if key != "datasets"]:
        raise ValueError(f"{path} has {', '.join(others)} next to `datasets`; put settings into the sets' own entries")
    return cast(list[Any], entries)


def _from_yaml(entry: Any, defaults: dict[str, Any], path: str) -> EvalDataset:
    known = {item.name for item in fields(EvalDataset)} - {"loss_on"}
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {entry!r} is not a mapping; write name: and path:")
    values = _by_name(cast(dict[Any, Any], entry), path)
    if unknown := set(values) - known:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {', '.join(sorted(known))}")
    if missing := {"name", "path"} - set(values):
        raise ValueError(f"{path}: a set has no {' and no '.join(sorted(missing))}; every set needs both")
    name, paths = _texts(values["name"]), _texts(values["path"])
    if wrong := [key for key, good in (("name", isinstance(name, str) and name), ("path", paths)) if not good]:
        raise ValueError(f"{path}: {wrong[0]} is {values[wrong[0]]!r}, which is not a text; write it in quotes")
    typed: dict[str, Any] = {}
    for key in [key for key in values if key in defaults]:
        try:
            typed[key] = from_yaml(_flag_of(key), values[key])
        except ValueError as error:
            shown = "null" if values[key] is None else values[key]
            raise ValueError(f"{path}: {values['name']}: {key} is {shown}; a value must be {error}") from error
    return EvalDataset(name=str(name), path=paths, **(defaults | typed))


def _texts(value: Any) -> str | tuple[str, ...]:
    """Return a text, or a list of texts as a tuple; an empty text for anything else."""
    if isinstance(value, list) and all(isinstance(each, str) and each for each in cast(list[Any], value)):
        return tuple(cast(list[str], value))
    return value if isinstance(value, str) else ""


def _by_name(entry: dict[Any, Any], path: str) -> dict[str, Any]:
    """Return the entry's values by field name. As in --config, dashes count as underscores; `eval_` is optional."""
    spelt: dict[str, str] = {}
    for key in map(str, entry):
        name = key.replace("-", "_").removeprefix("eval_")
        if name in spelt:
            raise ValueError(f"{path}: {spelt[name]} and {key} are spellings of the same key; leave one of the two out")
        spelt[name] = key
    return dict(zip(spelt, entry.values(), strict=True))


def _flag_of(key: str) -> FlagSpec:
    """Return the eval flag that `key` overrides: `temperature` -> --eval-temperature."""
    flags = {spec.name: spec for spec in all_flags() if spec.source == "slime"}
    return flags.get(f"eval_{key}") or flags[key]
