"""The model, built with Megatron-core's local specs from the arguments and the Architecture.

- Used by: `step` runs the model that is built here, `save_load` and `hf_weights` fill it; `parallel` must be
  initialized first.
- Invariant: the model ends at the last hidden states. `logprobs` computes log-probs from them chunk by chunk, so full
  logits never exist.

A pipeline rank holds ModelChunks: one part of the model, or several parts that do not follow each other if the pipeline
has virtual stages. Everything that loads, saves, sends or trains "the model" gets all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from slime.config.args import Args
from slime.config.experts import FLAG_NAMES, as_flags
from slime.config.pipeline_stages import micro_batch_group, num_chunks, overlaps
from slime.core.architecture import Architecture, padded_vocab_size
from slime.megatron import device
from slime.megatron.compat import cpu_layer
from slime.megatron.model.layer import RMSNorm, link_layers
from slime.megatron.model.layers import layer_spec
from slime.megatron.model.moe import disable_replay, with_float32_biases
from slime.megatron.model.stacked_experts import of_each_expert
from slime.megatron.optim.multi_tensor import fuse_weight_gradients
from slime.megatron.parallel import expert_place

T = TypeVar("T")

ModelChunks = tuple[torch.nn.Module, ...]
"""This rank's parts of the model, in the order in which a token passes them; a single one without virtual stages."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VALUE_HEAD = "value_head.weight"


class PolicyModel(GPTModel):
    """One pipeline stage of a GPTModel that ends at the last hidden states.

    It returns hidden states [tokens, 1, hidden]; under sequence parallelism these are this rank's part of the tokens.
    A stage that is not the last sends them to the next one.
    """

    def __init__(self, config: TransformerConfig, *args: Any, num_token_ids: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.num_token_ids = num_token_ids
        """The size of the vocabulary, without padding."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def _set_attention_backend(self) -> None:
        """Leave TransformerEngine's environment variables as they are: `flash_attention` reads the config itself."""

    def output_weight(self) -> Tensor:
        """Return this rank's rows of the output layer [padded vocabulary / TP, hidden]; of the embedding if it is tied.

        Call it on the last stage only. There, a tied weight is a copy of the embedding of the first stage.
        """
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        assert self.output_layer.weight is not None
        return self.output_layer.weight


class ValueHead(torch.nn.Module):
    """A linear layer from hidden states [tokens, 1, hidden] to values [tokens, 1, 1], computed in float32.

    The weight starts at 0, and so do all values: no parallel layout draws different random numbers. Every
    tensor-parallel rank holds the whole weight.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ValueModel(PolicyModel):
    """The critic's model: a value head on the last stage replaces the output layer."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **{**kwargs, "share_embeddings_and_output_weights": False})
        self.value_head = ValueHead(config) if self.post_process else None
        if self.post_process:
            del self.output_layer
            self.post_process = False  # Megatron would look for an output layer if it were True


def uses_bf16(args: Args) -> bool:
    """Return --bf16, or the device's default: True on CUDA, False on a CPU."""
    return device.on_cuda() if args.bf16 is None else args.bf16


def params_dtype(args: Args) -> torch.dtype:
    """Return the dtype in which the model holds, sends and stores its weights."""
    return torch.bfloat16 if uses_bf16(args) else torch.float32


def architecture_of(args: Args) -> Architecture:
    """Return the model's architecture; a ValueError names the flags that define it if it is unknown."""
    if args.architecture is None:
        raise ValueError("the model's architecture is unknown: give --hf-checkpoint, or MODEL_ARGS (scripts/models)")
    return args.architecture


def config_from(cls: type[T], args: Args, decided: dict[str, Any]) -> T:
    """Build `cls(**decided)`, plus the fields of it that the user passed through by name.

    Raises:
        ValueError: a passed-through field contradicts a value that slime decides.
    """
    names = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    extra = {name: value for name, value in args.megatron_extra.items() if name in names}
    for name, value in extra.items():
        if name in decided and decided[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: slime sets it to {decided[name]} itself; leave the flag out"
            )
    return cls(**{**extra, **decided})


def transformer_config(args: Args) -> TransformerConfig:
    """Return Megatron's config of this model under these parallel sizes."""
    if args.attention_dropout > 0:
        raise ValueError(
            f"--attention-dropout {args.attention_dropout}: packed attention has no dropout, and RL needs none "
            "(it would make the trainer's log-probs differ from the engine's); set it to 0"
        )
    arch = architecture_of(args)
    decided: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.add_qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "rotary_interleaved": arch.rotary_interleaved,
        "attention_backend": AttnBackend[args.attention_backend],
        "attention_dropout": 0.0,
        "hidden_dropout": args.hidden_dropout,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        # Megatron refuses it without tensor parallelism, where it has no meaning
        "sequence_parallel": args.sequence_parallel and args.tensor_model_parallel_size > 1,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        # without a pipeline Megatron would read it as the number of layers of the whole model
        "num_layers_in_last_pipeline_stage": (
            args.decoder_last_pipeline_num_layers if args.pipeline_model_parallel_size > 1 else None
        ),
        # It waits for the device after each exchange, which old PyTorch required. The schedule waits for the requests.
        "batch_p2p_sync": bool(args.megatron_extra.get("batch_p2p_sync", False)),
        # free a stage's output after it was sent to the next stage; an overlapped send may still be reading it
        "deallocate_pipeline_outputs": not overlaps(args),
        **_virtual_stages(args),
        "context_parallel_size": args.context_parallel_size,
        "recompute_granularity": args.recompute_granularity,
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
        "bf16": uses_bf16(args),
        "params_dtype": params_dtype(args),
        "pipeline_dtype": params_dtype(args),
        "use_cpu_initialization": not device.on_cuda(),
        # each step's loss carries its own denominator into the backward pass: gradients are summed, not averaged
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,  # packs differ in length; Megatron then requires this dispatcher, MoE or not
        "moe_token_dispatcher_type": "alltoall",
        # the fused kernels come with TransformerEngine or Apex
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }
    if not arch.num_experts:
        return config_from(TransformerConfig, args, decided)
    decided |= _experts(args, arch)
    passed = {name: value for name, value in args.megatron_extra.items() if name not in FLAG_NAMES}  # see `_experts`
    return config_from(TransformerConfig, replace(args, megatron_extra=passed), decided)


def _experts(args: Args, arch: Architecture) -> dict[str, Any]:
    """Return the fields of Megatron's config that describe experts."""
    return {
        **as_flags(arch),
        "num_moe_experts": arch.num_experts,
        "moe_shared_expert_intermediate_size": arch.shared_expert_ffn_hidden_size or None,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_size,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": args.moe_aux_loss_coeff,
        "moe_z_loss_coeff": args.moe_z_loss_coeff,
        "moe_router_bias_update_rate": args.moe_router_bias_update_rate,
        "moe_permute_fusion": False,  # TransformerEngine's
    }


def _virtual_stages(args: Args) -> dict[str, Any]:
    """Return the fields of Megatron's config for virtual stages; without them Megatron's defaults are right."""
    if num_chunks(args) == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": num_chunks(args),
        "microbatch_group_size_per_vp_stage": micro_batch_group(args),
        "overlap_p2p_comm": overlaps(args),
        "batch_p2p_comm": not overlaps(args),
    }


def build_model(args: Args, *, wrap: bool, kind: type[PolicyModel] = PolicyModel) -> ModelChunks:
    """Build everything that this rank holds of the model: chunks of `kind`, with `wrap` in data-parallel wrappers.

    A wrapped chunk is a DistributedDataParallel around a Float16Module (bf16 only) around the PolicyModel; `unwrap`
    returns the innermost.
    """
    with cpu_layer.layer():
        config = transformer_config(args)
        # only a model that trains has a gradient buffer to add to
        fuse = wrap and uses_bf16(args) and args.megatron_extra.get("gradient_accumulation_fusion", True)
        config.gradient_accumulation_fusion = fuse and fuse_weight_gradients()
        chunks = tuple(_build_chunk(args, config, kind, chunk, wrap=wrap) for chunk in range(num_chunks(args)))
        if wrap:  # the schedule reads these from the config, which all chunks share
            config.finalize_model_grads_func = _finalize_gradients
            # the routers have created their biases by now; `moe.move_biases` moves them once the step is certain
            config.moe_router_enable_expert_bias = False
            no_sync = [cast(DistributedDataParallel, chunk).no_sync for chunk in chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]
    return chunks


def _build_chunk(
    args: Args, config: TransformerConfig, kind: type[PolicyModel], chunk: int, *, wrap: bool
) -> torch.nn.Module:
    arch = architecture_of(args)
    stage, of_chunks = parallel_state.get_pipeline_model_parallel_rank(), num_chunks(args)
    virtual = chunk if of_chunks > 1 else None
    first, count = (of(config, virtual, stage) for of in (get_transformer_layer_offset, get_num_layers_to_build))
    layers = [layer_spec(args, config, layer) for layer in range(first, first + count)]
    core = kind(
        config,
        cast(Any, TransformerBlockSubmodules(layers, cast(Any, RMSNorm))),
        vocab_size=padded_vocab_size(
            arch.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        ),
        max_sequence_length=arch.max_position_embeddings,
        position_embedding_type="none",  # packed attention applies RoPE itself
        share_embeddings_and_output_weights=arch.tied_embeddings,
        pre_process=stage == chunk == 0,
        post_process=stage == config.pipeline_model_parallel_size - 1 and chunk == of_chunks - 1,
        vp_stage=virtual,
        num_token_ids=arch.vocab_size,
    )
    if args.recompute_granularity != "full":
        link_layers(core.decoder.layers, core.decoder.final_layernorm)
    if kind is not PolicyModel:
        disable_replay(core)
    model: torch.nn.Module = core.to(device.device())
    if not wrap:
        return with_float32_biases(model.to(params_dtype(args)))
    if uses_bf16(args):
        model = with_float32_biases(Float16Module(config, model))
    ddp_config = config_from(
        DistributedDataParallelConfig,
        args,
        {"grad_reduce_in_fp32": True, "use_distributed_optimizer": bool(args.use_distributed_optimizer)},
    )
    # Buckets let gradients be reduced while others are computed: useful in the chunk that comes last in backward only
    wrapped = DistributedDataParallel(config, ddp_config, model, disable_bucketing=chunk > 0)
    wrapped.broadcast_params()
    return wrapped


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Run Megatron's reduction over all groups without its division by tokens: our loss carries its denominator."""
    finalize_model_grads(model, None, **kwargs)


def unwrap(model: torch.nn.Module) -> PolicyModel:
    """Return the PolicyModel inside a chunk's wrappers."""
    while not isinstance(model, PolicyModel):
        model = model.module  # pyright: ignore[reportAssignmentType]
    return model


def all_parameters(model: ModelChunks) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of all chunks, in their order."""
    for chunk in model:
        yield from chunk.parameters()


def named_parameters(model: ModelChunks) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's parameters by global name: layers and experts are numbered over the whole model.

    Each expert's weights come alone, as a part of the parameter of all experts; see `stacked_experts.of_each_expert`.
    On the last of several stages a tied output layer has a weight of its own; it has the embedding's name.
    """
    for core in map(unwrap, model):
        for name, parameter in core.named_parameters():
            for own, part in of_each_expert(name, parameter):
                yield _global_name(core, own), part


def named_weights(model: ModelChunks) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors that a checkpoint holds: the parameters and the routers' biases, which no gradient trains."""
    for chunk in model:
        yield from named_parameters((chunk,))
        core = unwrap(chunk)
        yield from ((_global_name(core, name), buffer) for name, buffer in core.named_buffers() if _is_bias(name))


def all_weights(model: ModelChunks) -> Iterator[Tensor]:
    """Yield the tensors of `named_weights` without their names."""
    for _, weight in named_weights(model):
        yield weight


def _is_bias(buffer: str) -> bool:
    """True for a router's bias, the only buffer that a checkpoint stores; routers reset their others in every step."""
    return buffer.endswith(".expert_bias")


def _global_name(core: PolicyModel, name: str) -> str:
    if name == OUTPUT and core.share_embeddings_and_output_weights:
        return EMBEDDING
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(cast(TransformerLayer, core.decoder.layers[int(parts[2])]).layer_number - 1)
    if "local_experts" in parts:
        place, number = expert_place(), parts.index("local_experts") + 1
        assert core.config.num_moe_experts is not None
        parts[number] = str(int(parts[number]) + place.ep_rank * core.config.num_moe_experts // place.ep_size)
    return ".".join(parts)
