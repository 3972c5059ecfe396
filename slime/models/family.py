"""`Family`: everything that distinguishes one model family from the others.

- Used by: each family file makes one record, `families` lists them; config, megatron, the embedded engine and the tools
  read the records.
- Invariant: no other code compares a family's name. What it needs to know about a family is a field here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.core.architecture import Architecture
from slime.models.mapping import Rule


def with_head_dim(arch: Architecture) -> dict[str, Any]:
    """Return the size of a head, which most families' config.json gives."""
    return {"head_dim": arch.kv_channels}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: how its config.json, Megatron's flags and its weights describe a model."""

    model_type: str
    """The value of `model_type` in config.json, and `Architecture.family`."""
    transformers_class: str
    """The beginning of the names of its classes in transformers, such as Glm4 of Glm4Config and Glm4ForCausalLM."""
    rules: Callable[[Architecture], list[Rule]]
    """Makes the rules between Megatron's parameters and HF's tensors."""

    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda config: {})
    """Returns the fields of Architecture that only this family sets, or reads in a way of its own, from config.json.

    It may raise ValueError for values that are not supported, and KeyError for a required key that is missing.
    """
    write: Callable[[Architecture], Mapping[str, Any]] = with_head_dim
    """Returns the keys of config.json that are neither shared by all families nor in `hf_keys`."""
    hf_keys: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further fields of Architecture whose values config.json has under a key of its own: {field: key}."""
    default_head_dim: int | None = None
    """The size of a head if config.json has no head_dim; None: hidden_size / num_attention_heads."""
    partial_rotary: bool = False
    """Whether partial_rotary_factor counts, which is 0.5 if config.json lacks it. Other families rotate whole heads."""
    windows: Literal["unswitched", "unless null", "some layers", "all layers"] = "unswitched"
    """Where sliding-window attention applies, which is not supported.

    'unswitched': in all layers, if sliding_window is set. 'unless null': in all layers, also if config.json lacks the
    key. Otherwise use_sliding_window turns it on: for the layers that layer_types or max_window_layers name, or for all
    layers.
    """
    refuses_attention_bias: bool = False
    """Whether attention_bias would also give the output projection a bias, which is not supported."""

    flags: tuple[str, ...] = ()
    """The flags of MODEL_ARGS that identify the family, as a user types them."""
    optional_flags: tuple[str, ...] = ()
    """Flags of MODEL_ARGS that some models of the family have; the identifying flags of other families are refused."""
    shares_flags: bool = False
    """Whether MODEL_ARGS cannot tell it from another family, which they then mean; only config.json names this one."""
    has_experts: bool = False
    """Whether its layers are mixtures of experts."""

    plain_tokenizer: bool = False
    """Whether transformers has no tokenizer class for the family: its AutoTokenizer then takes the general class."""
    fused_gate_up: bool = False
    """Whether HF stores gate and up projection of a dense MLP as one tensor, gate_up_proj."""
    has_mtp_layer: bool = False
    """Whether HF files may have an MTP layer (multi-token prediction) after the last layer.

    Like transformers, we neither read nor write it.
    """

    def ignored_prefix(self, arch: Architecture) -> str | None:
        """Return the beginning of the HF names that are neither read nor written; None: there are no such names."""
        return f"model.layers.{arch.num_layers}." if self.has_mtp_layer else None
