"""The model's architecture, read from the HF config.json and compared with MODEL_ARGS, or from MODEL_ARGS alone.

- Used by: `parse`, which calls `resolve_architecture` after `resolve`; all other code reads `args.architecture`.
- Invariant: config.json and the given flags agree, except for flags that --override-hf-config names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from slime.config import experts
from slime.config.args import Args
from slime.config.hf_config import check_hf_config, read_hf_config
from slime.config.hf_features import refuse_unknown, rope_of, rope_scaling, rotated_fraction, unknown_keys
from slime.config.problem import Problem, flag_name, show
from slime.core.architecture import Architecture, RopeScaling
from slime.core.printable import printable
from slime.models.families import FAMILIES, family_names
from slime.models.family import Family

_OTHERS = ("family", "tied_embeddings", "rope_scaling", *experts.FLAGS)
SAME_NAME = tuple(f.name for f in fields(Architecture) if f.name not in _OTHERS)
"""The fields of Architecture that have a flag of the same name."""
ARCHITECTURE_FLAGS = (
    *SAME_NAME,
    "untie_embeddings_and_output_weights",
    "use_rope_scaling",
    "rotary_scaling_factor",
)
"""All flags that a config.json determines."""


def hf_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json describes. It reads transformers 5's rope_parameters and older keys.

    Raises:
        ValueError: the family, or one of its features, is not supported.
        KeyError: a required key is missing.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {printable(repr(model_type))} is not one of {family_names()}")
    family = FAMILIES[model_type]
    refuse_unknown(config, family)
    check_hf_config(config)
    heads = config["num_attention_heads"]
    rope = rope_of(config)
    rotary_percent = rotated_fraction(config) if family.partial_rotary else 1.0
    return Architecture(
        family=model_type,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        # the default of transformers if config.json does not give it
        kv_channels=config.get("head_dim") or family.default_head_dim or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_epsilon=float(config["rms_norm_eps"]),
        rotary_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rotary_percent=float(rotary_percent),
        rope_scaling=rope_scaling(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        **_own_fields(config, family),
    )


def _own_fields(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the fields of Architecture that only some families have, including the fields of experts."""
    own = dict(family.read(config))
    return own | experts.hf_experts(config, own) if family.has_experts else own


_HF_KEYS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_ROPE_KEYS: Mapping[str, str] = {"rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor"}
_SCALING_KEYS = {field.name for field in fields(RopeScaling)}


def config_of(arch: Architecture, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `config` changed so that it describes `arch`, and the flags that config.json cannot express.

    `arch` differs from `config` only in what --override-hf-config changed.
    """
    new, before = dict(config), hf_architecture(config)
    changed = {f.name for f in fields(Architecture) if getattr(arch, f.name) != getattr(before, f.name)}
    keys = {**_HF_KEYS, **FAMILIES[before.family].hf_keys}
    new |= {key: getattr(arch, name) for name, key in keys.items() if name in changed}
    if config.get("rope_parameters"):
        new.pop("rope_scaling", None)  # it repeats rope_parameters, and only one of them is changed
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope: dict[str, Any] = dict(config.get(place) or {})
    for name, key in _ROPE_KEYS.items():
        if name in changed:
            (rope if key in rope or place == "rope_parameters" else new)[key] = getattr(arch, name)
    if "rope_scaling" in changed:
        new.pop("original_max_position_embeddings", None)  # it repeats the value in `rope`
        rope = {key: value for key, value in rope.items() if key not in (*_SCALING_KEYS, "type", "rope_type")}
        rope |= {"rope_type": "default"} if arch.rope_scaling is None else asdict(arch.rope_scaling)
        rope |= {} if arch.rope_scaling is None else {"rope_type": "llama3"}
    if rope:
        new[place] = rope
    after = hf_architecture(new)
    return new, [flag_name(name) for name in sorted(changed) if getattr(after, name) != getattr(arch, name)]


def as_flags(arch: Architecture) -> dict[str, Any]:
    """Return the values of ARCHITECTURE_FLAGS that describe `arch`; None for a flag that does not apply."""
    scaling = arch.rope_scaling
    return {name: getattr(arch, name) for name in SAME_NAME} | {
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
        "use_rope_scaling": scaling is not None,
        "rotary_scaling_factor": None if scaling is None else scaling.factor,
    }


def given_flags(args: Args) -> dict[str, Any]:
    """Return the architecture flags that were given, by name."""
    return {name: vars(args)[name] for name in ARCHITECTURE_FLAGS if vars(args)[name] is not None}


def _with_flags(arch: Architecture, given: Mapping[str, Any], extra: Mapping[str, Any]) -> Architecture:
    """Return `arch` with the values of the given flags.

    Flags only switch RoPE scaling on or off and set its factor; its other values are those of `arch`. `extra`: the
    flags that pass through to Megatron, from which the experts' flags are read unless the model is dense.
    """
    changes = {name: value for name, value in given.items() if name in SAME_NAME}
    if "untie_embeddings_and_output_weights" in given:
        changes["tied_embeddings"] = not given["untie_embeddings_and_output_weights"]
    scaling = arch.rope_scaling
    if "use_rope_scaling" in given:
        scaling = (scaling or RopeScaling()) if given["use_rope_scaling"] else None
    if scaling is not None and "rotary_scaling_factor" in given:
        scaling = replace(scaling, factor=given["rotary_scaling_factor"])
    arch = replace(arch, **changes, rope_scaling=scaling)
    return replace(arch, **experts.given_fields(extra, arch)) if arch.num_experts else arch


def _matching_family(given: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Return the family whose layers MODEL_ARGS describe.

    `extra`: the flags that pass through to Megatron, which a dense model does not read.

    Raises:
        ValueError: no family has such layers.
    """
    has_experts = bool(given.get("num_experts"))
    values = {**extra, **given} if has_experts else given
    known = {flag for family in FAMILIES.values() for flag in (*family.flags, *family.optional_flags)}
    found = {flag for flag in known if _is_set(flag, values)}
    candidates = [one for one in FAMILIES.values() if one.has_experts == has_experts and not one.shares_flags]
    for family in candidates:
        if found - set(family.optional_flags) == set(family.flags):
            return family.model_type
    what = "family of experts" if has_experts else "family"
    described = [f"{family.model_type} has {_and(family.flags)}" for family in candidates[:-1]]
    described.append(f"{candidates[-1].model_type} has {_and((*candidates[-1].flags, 'none of these'))}")
    raise ValueError(f"MODEL_ARGS match no supported {what}: {', '.join(described)}")


def _is_set(flag: str, values: Mapping[str, Any]) -> bool:
    """Return whether `values` turn on `flag`, which is written as on the command line: `--x`, or `--x value`."""
    name, _, value = flag.partition(" ")
    found = values.get(name.removeprefix("--").replace("-", "_"))
    return found == value if value else bool(found)


def _and(words: Sequence[str]) -> str:
    """Return 'a, b and c'."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def flags_architecture(args: Args) -> Architecture:
    """Return the architecture that MODEL_ARGS alone describe, with Megatron's defaults for missing flags.

    Raises:
        ValueError: the flags do not determine the sizes or the family.
    """
    given = given_flags(args)
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    missing = [flag_name(name) for name in needed if name not in given]
    if given.get("num_experts"):
        missing += [flag_name(name) for name in experts.NEEDED if name not in args.megatron_extra]
    if missing:
        raise ValueError(f"MODEL_ARGS lack {', '.join(missing)}")
    bare = Architecture(
        family=_matching_family(given, args.megatron_extra),
        **{name: given[name] for name in needed},
        num_query_groups=given["num_attention_heads"],
        kv_channels=given["hidden_size"] // given["num_attention_heads"],
        max_position_embeddings=args.seq_length or 32768,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        tied_embeddings=True,
    )
    return _with_flags(bare, given, args.megatron_extra)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs


def _as_flag(name: str, value: Any) -> tuple[str, str]:
    """Return flag and value as a user would type them."""
    if isinstance(value, bool):
        return ("--" if value else "--no-") + name.replace("_", "-"), ""
    return flag_name(name), show(value)


def conflicts(args: Args, config: Architecture) -> list[Problem]:
    """Return one error for each given flag that config.json contradicts and --override-hf-config does not name."""
    overridden = {name.lstrip("-").replace("-", "_") for name in args.override_hf_config}
    problems: list[Problem] = []
    config_flags = as_flags(config) | experts.as_flags(config)
    for name, ours in (given_flags(args) | experts.given_flags(args.megatron_extra, config)).items():
        theirs = config_flags[name]
        if theirs is None or _same(ours, theirs) or name in overridden:
            continue
        flag, value = _as_flag(name, ours)
        config_flag, config_value = _as_flag(name, theirs)
        problems.append(
            Problem(
                severity="error",
                where=flag,
                value=value,
                rule=f"{args.hf_checkpoint}/config.json has {config_flag} {config_value}".rstrip(),
                remedy=f"correct MODEL_ARGS, or add --override-hf-config {name.replace('_', '-')} to keep your value",
                fields=frozenset([name]),
            )
        )
    if args.group_query_attention is False and config.num_query_groups != config.num_attention_heads:
        problems.append(
            Problem(
                severity="error",
                where="--no-group-query-attention",
                rule=f"{args.hf_checkpoint}/config.json has {config.num_query_groups} KV heads for "
                f"{config.num_attention_heads} attention heads",
                remedy="leave it out",
                fields=frozenset(["group_query_attention"]),
            )
        )
    return problems


def _factor_of_nothing(args: Args, arch: Architecture) -> list[Problem]:
    """Refuse --rotary-scaling-factor if the resolved model has no RoPE scaling."""
    if args.rotary_scaling_factor is None or arch.rope_scaling is not None:
        return []
    return [
        Problem(
            severity="error",
            where="--rotary-scaling-factor",
            value=show(args.rotary_scaling_factor),
            rule="this model has no RoPE scaling",
            remedy="add --use-rope-scaling, or leave the flag out",
            fields=frozenset(["rotary_scaling_factor", "use_rope_scaling"]),
        )
    ]


def _override_problems(args: Args) -> list[Problem]:
    """Return problems with names in --override-hf-config: no architecture flag, or a flag that is not given."""
    problems: list[Problem] = []
    for name in args.override_hf_config:
        field = name.lstrip("-").replace("-", "_")
        known = field in ARCHITECTURE_FLAGS or field in experts.FLAG_NAMES
        if known and (vars(args).get(field) is not None or field in args.megatron_extra):
            continue
        problems.append(
            Problem(
                severity="warning" if known else "error",
                where="--override-hf-config",
                value=name,
                rule="that flag is not given, so nothing is overridden" if known else "is not an architecture flag",
                remedy="leave it out"
                if known
                else f"name one of {', '.join((*ARCHITECTURE_FLAGS, *experts.FLAG_NAMES))}",
                fields=frozenset(["override_hf_config"]),
            )
        )
    return problems


def _unknown_keys(args: Args, config: Mapping[str, Any]) -> list[Problem]:
    """Return one warning with the keys of config.json that slime does not read and does not know to be harmless."""
    names = unknown_keys(config)
    if not names:
        return []
    return [
        Problem(
            severity="warning",
            where="--hf-checkpoint",
            value=args.hf_checkpoint or "",
            rule=f"its config.json has keys that slime does not read: {', '.join(names)}",
            remedy="check whether the model depends on them",
            fields=frozenset(["hf_checkpoint"]),
        )
    ]


def resolve_architecture(args: Args) -> tuple[Args, list[Problem]]:
    """Return Args with `architecture` and the architecture flags filled in, and the problems with them."""
    problems = _override_problems(args)
    severity = "warning" if args.dry_run else "error"

    def complain(rule: str, remedy: str) -> None:
        problems.append(
            Problem(
                severity=severity,
                where="--hf-checkpoint",
                value=args.hf_checkpoint or "",
                rule=rule,
                remedy=remedy,
                fields=frozenset(["hf_checkpoint"]),
            )
        )

    config: Architecture | None = None
    config_fault: str | None = None
    raw: dict[str, Any] = {}
    if args.hf_checkpoint is None:
        complain("not given; tokenizer, config and the engines' first weights come from it", "name an HF directory")
    else:
        try:
            raw = read_hf_config(args.hf_checkpoint)
            config = hf_architecture(raw)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            config_fault = (
                "there is no config.json" if missing else f"its config.json cannot be read ({error.strerror})"
            )
            complain(config_fault, "name a downloaded HF directory (`hf download MODEL --local-dir DIR`)")
        except KeyError as error:
            complain(f"its config.json has no {error}", "name an HF directory of a causal language model")
        except ValueError as error:
            complain(str(error), "use a model of a supported family, with its config.json as it was published")
    if config is not None:
        problems += _unknown_keys(args, raw)
        try:
            problems += conflicts(args, config)
            architecture = _with_flags(config, given_flags(args), args.megatron_extra)
        except ValueError as error:
            complain(str(error), "correct MODEL_ARGS")
            return args, problems
    else:
        try:
            architecture = flags_architecture(args)
        except ValueError as error:
            if args.dry_run and config_fault is not None and not given_flags(args):
                problems.pop()  # one line for both
                remedy = "download it (`hf download MODEL --local-dir DIR`), or append MODEL_ARGS of scripts/models"
                complain(f"{config_fault}, so the plan has no model and no estimate of memory", remedy)
            elif args.dry_run:
                complain(
                    f"the plan has no model and no estimate of memory: {error}", "add MODEL_ARGS of scripts/models"
                )
            return args, problems
    return replace(
        args,
        **as_flags(architecture),
        architecture=architecture,
        group_query_attention=architecture.num_query_groups != architecture.num_attention_heads,
    ), problems + _factor_of_nothing(args, architecture)
