"""The rule for HF directories other than --hf-checkpoint, whose weights are loaded into the run's own model.

- Used by: `rules.check`.
- Invariant: a config.json that describes another computation is reported before its weights are loaded into the
  layers of this model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slime.config import experts
from slime.config.architecture import as_flags, hf_architecture, read_hf_config
from slime.config.problem import Problem, flag_name, show
from slime.config.rules.case import Case
from slime.core.architecture import Architecture
from slime.core.small_files import is_file

MAY_DIFFER = ("max_position_embeddings", "untie_embeddings_and_output_weights")
"""Fields that may differ: a limit on the length, and whether two tables are tied, which loading compares."""


def other_models(case: Case) -> Iterable[Problem]:
    """Check that --ref-load, --load and --critic-load contain the trained model, not another one of equal sizes."""
    model = case.args.architecture
    for field in ("ref_load", "load", "critic_load"):
        path: str | None = vars(case.args)[field]
        if model is None or path is None or path == case.args.hf_checkpoint or not is_file(f"{path}/config.json"):
            continue
        try:
            found = _differences(case, hf_architecture(read_hf_config(path)), model)
        except KeyError as error:
            yield case.missing(
                field, f"its config.json has no {error}", "name an HF directory of a causal language model"
            )
        except OSError as error:
            yield case.missing(field, f"its config.json cannot be read ({error.strerror})", "name an HF directory")
        except ValueError as error:
            yield case.missing(field, str(error), "use a model of a family that is built")
        else:
            if found:
                rule = f"its config.json has {', '.join(found)}: its weights would run in another model's computation"
                yield case.missing(field, rule, "name weights of the same model, or correct that config.json")


def _differences(case: Case, theirs: Architecture, model: Architecture) -> list[str]:
    """Return the differences between the two as flags, except those that --override-hf-config intends."""
    if theirs.family != model.family:
        return [f"model_type {theirs.family}, and the model is {model.family}"]
    skipped = {*MAY_DIFFER, *(name.lstrip("-").replace("-", "_") for name in case.args.override_hf_config)}
    here, there = (as_flags(arch) | experts.as_flags(arch) for arch in (model, theirs))
    names = [name for name in here if name not in skipped and here[name] != there.get(name)]
    found = [f"{flag_name(name)} {_shown(there.get(name))}, and the model {_shown(here[name])}" for name in names]
    scaling = theirs.rope_scaling != model.rope_scaling and "use_rope_scaling" not in skipped
    return found or (["another RoPE scaling than the model"] if scaling else [])


def _shown(value: Any) -> str:
    return show(value) or str(value)
