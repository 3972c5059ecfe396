"""The model's shape: from the HF config.json, checked against MODEL_ARGS, or from MODEL_ARGS alone.

Path: `parse` calls `resolve_architecture` after `resolve`; everything below reads `args.architecture`. Invariant: where
both say something they say the same, except for flags that --override-hf-config names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from slime.config.args import Args
from slime.config.problem import Problem, flag_name, show
from slime.core.architecture import Architecture

FAMILIES = ("glm4", "qwen3")

SAME_NAME = tuple(f.name for f in fields(Architecture) if f.name not in ("family", "tied_embeddings"))
"""Fields of Architecture that are a flag of the same name."""
ARCHITECTURE_FLAGS = (*SAME_NAME, "untie_embeddings_and_output_weights")


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """config.json of an HF directory. Raises OSError where there is none, ValueError where it is not JSON."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return cast(dict[str, Any], config)


def hf_architecture(config: Mapping[str, Any]) -> Architecture:
    """The shape that a config.json describes; transformers 5's rope_parameters and the older keys are both read.

    Raises:
        ValueError: a family, or a feature of one, that is not built.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"RoPE of type {rope_type!r} is not built, only the default one")
    if config.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not built")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not built, only silu")
    glm4 = family == "glm4"
    heads = config["num_attention_heads"]
    rotary_percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)) if glm4 else 1.0
    return Architecture(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or 128,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_epsilon=float(config["rms_norm_eps"]),
        rotary_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rotary_percent=float(rotary_percent),
        rotary_interleaved=glm4,
        add_qkv_bias=bool(config.get("attention_bias", glm4)),
        qk_layernorm=not glm4,
        post_self_attn_layernorm=glm4,
        post_mlp_layernorm=glm4,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def given_flags(args: Args) -> dict[str, Any]:
    """The architecture flags that were given, by the name of Architecture's field."""
    values = {name: vars(args)[name] for name in SAME_NAME if vars(args)[name] is not None}
    if args.untie_embeddings_and_output_weights is not None:
        values["tied_embeddings"] = not args.untie_embeddings_and_output_weights
    return values


def flags_architecture(args: Args) -> Architecture:
    """The shape that MODEL_ARGS alone describe, with Megatron's defaults for what they leave out.

    The family is told by its norms. Raises ValueError where the sizes or the family cannot be told.
    """
    given = given_flags(args)
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    missing = [flag_name(name) for name in needed if name not in given]
    if missing:
        raise ValueError(f"MODEL_ARGS leave out {', '.join(missing)}")
    if given.get("post_self_attn_layernorm") and given.get("post_mlp_layernorm"):
        family = "glm4"
    elif given.get("qk_layernorm"):
        family = "qwen3"
    else:
        raise ValueError(
            "MODEL_ARGS are of no family that is built: glm4 has --post-self-attn-layernorm and "
            "--post-mlp-layernorm, qwen3 has --qk-layernorm"
        )
    defaults: dict[str, Any] = {
        "num_query_groups": args.num_attention_heads,
        "kv_channels": given["hidden_size"] // given["num_attention_heads"],
        "max_position_embeddings": args.seq_length or 32768,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "tied_embeddings": True,
    }
    return Architecture(family=family, **(defaults | given))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs


def _as_flag(name: str, value: Any) -> tuple[str, str]:
    """Flag and value as they would be typed."""
    if name == "tied_embeddings":
        name, value = "untie_embeddings_and_output_weights", not value
    if isinstance(value, bool):
        return ("--" if value else "--no-") + name.replace("_", "-"), ""
    return flag_name(name), show(value)


def conflicts(args: Args, config: Architecture) -> list[Problem]:
    """One error for each given flag that config.json contradicts and --override-hf-config does not name."""
    overridden = {name.lstrip("-").replace("-", "_") for name in args.override_hf_config}
    problems: list[Problem] = []
    for name, ours in given_flags(args).items():
        theirs = getattr(config, name)
        field = "untie_embeddings_and_output_weights" if name == "tied_embeddings" else name
        if _same(ours, theirs) or field in overridden:
            continue
        flag, value = _as_flag(name, ours)
        config_flag, config_value = _as_flag(name, theirs)
        problems.append(
            Problem(
                severity="error",
                where=flag,
                value=value,
                rule=f"{args.hf_checkpoint}/config.json says {config_flag} {config_value}".rstrip(),
                remedy=f"correct MODEL_ARGS, or add --override-hf-config {field.replace('_', '-')} to keep yours",
                fields=frozenset([field]),
            )
        )
    return problems


def _override_problems(args: Args) -> list[Problem]:
    """Names in --override-hf-config that are no architecture flags, or that nothing overrides."""
    problems: list[Problem] = []
    for name in args.override_hf_config:
        field = name.lstrip("-").replace("-", "_")
        known = field in ARCHITECTURE_FLAGS
        if known and vars(args)[field] is not None:
            continue
        problems.append(
            Problem(
                severity="warning" if known else "error",
                where="--override-hf-config",
                value=name,
                rule="that flag is not given, so nothing is overridden" if known else "is no architecture flag",
                remedy="leave it out" if known else f"name one of {', '.join(ARCHITECTURE_FLAGS)}",
                fields=frozenset(["override_hf_config"]),
            )
        )
    return problems


def resolve_architecture(args: Args) -> tuple[Args, list[Problem]]:
    """Args with `architecture` and the architecture flags filled in, and what is wrong with them."""
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
    if args.hf_checkpoint is None:
        complain("not given; tokenizer, config and the engines' first weights come from it", "name an HF directory")
    else:
        try:
            config = hf_architecture(read_hf_config(args.hf_checkpoint))
        except OSError:
            complain("there is no config.json", "name a downloaded HF directory (`hf download MODEL --local-dir DIR`)")
        except KeyError as error:
            complain(f"its config.json has no {error}", "name an HF directory of a causal language model")
        except ValueError as error:
            complain(str(error), "use a model of a family that is built")
    if config is not None:
        problems += conflicts(args, config)
        architecture = replace(config, **given_flags(args))
    else:
        try:
            architecture = flags_architecture(args)
        except ValueError as error:
            if args.dry_run:
                complain(f"the plan has no model: {error}", "add MODEL_ARGS from scripts/models")
            return args, problems
    filled = {name: getattr(architecture, name) for name in SAME_NAME}
    return replace(
        args,
        **filled,
        architecture=architecture,
        group_query_attention=architecture.num_query_groups != architecture.num_attention_heads,
        untie_embeddings_and_output_weights=not architecture.tied_embeddings,
    ), problems
