"""Typed declarations of the Megatron flags that slime itself reads.

Names, meanings and defaults are Megatron's. Architecture flags default to None, "not given"; their values then come
from the HF config.json. All other flags of Megatron pass through by the table `megatron_flags.json`, which is generated
from megatron-core's dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags.flag import Needs, flag


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """The model (MODEL_ARGS). An unset flag takes its value from config.json."""

    num_layers: int | None = flag(None, "Transformer layers.", ge=1, le=10000)
    hidden_size: int | None = flag(None, "Channels of the residual stream.", ge=1)
    ffn_hidden_size: int | None = flag(None, "Channels of the MLP, for one of the two gated halves.", ge=1)
    num_attention_heads: int | None = flag(None, "Query heads.", ge=1)
    group_query_attention: bool | None = flag(None, "Grouped-query attention (with --num-query-groups).")
    num_query_groups: int | None = flag(
        None, "Key/value heads; without --group-query-attention as many as query heads.", ge=1
    )
    kv_channels: int | None = flag(None, "Channels of one head; unset: hidden size / heads.", ge=1)
    vocab_size: int | None = flag(None, "Size of the vocabulary before padding.", ge=1)
    make_vocab_size_divisible_by: int = flag(128, "The vocabulary is padded to a multiple of this x TP.", ge=1)
    max_position_embeddings: int | None = flag(
        None, "Largest number of tokens of prompt and response that the model supports.", ge=1
    )
    seq_length: int | None = flag(None, "Accepted without effect: packing needs no sequence length.", ge=1)
    normalization: str | None = flag(None, "Type of the norms.")
    norm_epsilon: float | None = flag(None, "Epsilon of the norms.", gt=0)
    swiglu: bool | None = flag(None, "Gated SiLU MLP.")
    disable_bias_linear: bool | None = flag(None, "No biases in linear layers.")
    add_qkv_bias: bool | None = flag(None, "Bias in the QKV projection.")
    qk_layernorm: bool | None = flag(None, "Norm on queries and keys.")
    post_self_attn_layernorm: bool | None = flag(None, "Norm after the attention (sandwich norm).")
    post_mlp_layernorm: bool | None = flag(None, "Norm after the MLP (sandwich norm).")
    untie_embeddings_and_output_weights: bool | None = flag(None, "Output layer with weights of its own.")
    position_embedding_type: str | None = flag(None, "Type of the position embedding.")
    use_rotary_position_embeddings: bool | None = flag(None, "Older spelling of --position-embedding-type rope.")
    rotary_base: float | None = flag(None, "RoPE base.", gt=0)
    rotary_percent: float | None = flag(None, "Fraction of a head that is rotated.", gt=0, le=1)
    rotary_interleaved: bool | None = flag(None, "Rotate neighbouring pairs instead of halves.")
    use_rope_scaling: bool | None = flag(
        None, "Llama 3's RoPE scaling. Values that config.json does not give are those of Llama 3.1."
    )
    rotary_scaling_factor: float | None = flag(None, "Factor of the RoPE scaling; 8 if config.json has none.", gt=0)
    no_rope_fusion: bool = flag(False, "Unfused RoPE (always so here).")
    num_experts: int | None = flag(None, "Experts per mixture-of-experts layer; 0: a dense model.", ge=0, le=65536)
    spec: tuple[str, ...] = flag(
        (),
        "Your own transformer layer: `function(args, config)` returns its ModuleSpec of Megatron. The engines must "
        "compute the same function; --logprob-gap-alarm reports when they do not.",
        nargs=2,
        metavar="MODULE FUNCTION",
    )
    attention_dropout: float = flag(0.0, "Dropout in attention; 0 in RL.", ge=0, lt=1)
    hidden_dropout: float = flag(0.0, "Dropout elsewhere; 0 in RL.", ge=0, lt=1)
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = flag(
        "auto",
        "Kernel of the trainer's attention on GPUs. auto, flash: FlashAttention-4 where it is installed and fits, else "
        "PyTorch's flash attention; fused: PyTorch's flash attention; unfused, local: one SDPA call per sequence.",
    )


_FULL_RECOMPUTE = Needs(("recompute_granularity",), why="it belongs to --recompute-granularity full")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Parallel sizes and micro-batches (PERF_ARGS)."""

    tensor_model_parallel_size: int = flag(
        1,
        "Ranks over which the matrices of each layer are sharded. Must divide query heads, KV heads and MLP channels.",
        ge=1,
        le=65536,
    )
    sequence_parallel: bool = flag(
        False,
        "Split the tokens of norms and residuals over the tensor-parallel ranks as well; saves activation memory.",
    )
    pipeline_model_parallel_size: int = flag(1, "Pipeline stages that the layers are split into.", ge=1, le=65536)
    decoder_last_pipeline_num_layers: int | None = flag(
        None, "Layers of the last pipeline stage, which also has the output layer; the others share the rest.", ge=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "Layers per virtual pipeline stage. Each stage then has several virtual stages.", ge=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None,
        "Virtual stages per pipeline stage. Use it instead of --num-layers-per-virtual-pipeline-stage when "
        "--decoder-last-pipeline-num-layers is given.",
        ge=1,
    )
    context_parallel_size: int = flag(1, "Ranks over which the tokens of each pack are split.", ge=1, le=65536)
    expert_model_parallel_size: int = flag(1, "Ranks over which the experts are distributed.", ge=1, le=65536)
    expert_tensor_parallel_size: int | None = flag(
        None, "Tensor-parallel size of experts; unset: --tensor-model-parallel-size.", ge=1, le=65536
    )
    recompute_granularity: Literal["full", "selective"] | None = flag(
        None,
        "Recompute activations in the backward pass to save memory. full: whole layers. selective: core attention.",
    )
    recompute_method: Literal["uniform", "block"] | None = flag(
        None,
        "With full recompute. uniform: in units of --recompute-num-layers layers. block: that many first layers of a "
        "stage, one by one.",
        needs=_FULL_RECOMPUTE,
    )
    recompute_num_layers: int | None = flag(
        None,
        "Layers per recomputed unit (uniform), or number of recomputed layers (block).",
        ge=1,
        needs=_FULL_RECOMPUTE,
    )
    micro_batch_size: int = flag(1, "Samples per micro-batch, without --use-dynamic-batch-size.", ge=1)
    global_batch_size: int | None = flag(
        None, "Samples per optimizer step; unset: samples of a rollout / --num-steps-per-rollout.", ge=1
    )
    calculate_per_token_loss: bool = flag(
        False, "Average the loss over all tokens of a step, instead of over each sample's tokens and then over samples."
    )


_WSD = Needs(("lr_decay_style",), value="WSD")
_ADAM = Needs(("optimizer",), value="adam", why="it belongs to adam")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer and its schedules (OPTIMIZER_ARGS)."""

    optimizer: Literal["adam", "sgd"] = flag("adam", "adam is AdamW, with decoupled weight decay.")
    lr: float = flag(1e-6, "Learning rate after the warm-up.", ge=0)
    min_lr: float = flag(0.0, "Learning rate at the end of the decay.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag(
        "constant", "Shape of the decay."
    )
    lr_decay_iters: int | None = flag(None, "Optimizer steps of the decay; unset: all steps of the run.", ge=1)
    lr_warmup_iters: int = flag(0, "Optimizer steps of linear warm-up from --lr-warmup-init to --lr.", ge=0)
    lr_warmup_fraction: float | None = flag(
        None, "Warm-up as a fraction of the decay's steps; replaces --lr-warmup-iters.", ge=0, lt=1
    )
    lr_warmup_init: float = flag(0.0, "Learning rate at the start of the warm-up.", ge=0)
    lr_wsd_decay_iters: int | None = flag(None, "Optimizer steps of WSD's decay.", ge=1, needs=_WSD)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = flag(
        "linear", "Shape of WSD's decay.", needs=_WSD
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "A resumed run keeps the checkpoint's schedule (rates, lengths and styles) and ignores the flags for it."
    )
    override_opt_param_scheduler: bool = flag(
        True, "A resumed run follows the flags' schedule, unless --use-checkpoint-opt-param-scheduler is given."
    )
    weight_decay: float = flag(0.01, "Decoupled weight decay.", ge=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = flag(
        "constant", "How the weight decay grows from --start-weight-decay to --end-weight-decay over the run."
    )
    start_weight_decay: float | None = flag(None, "Weight decay at the first optimizer step.", ge=0)
    end_weight_decay: float | None = flag(
        None, "Weight decay after the last optimizer step; at least --start-weight-decay.", ge=0
    )
    adam_beta1: float = flag(0.9, "Adam's beta1.", ge=0, lt=1, needs=_ADAM)
    adam_beta2: float = flag(0.999, "Adam's beta2.", ge=0, lt=1, needs=_ADAM)
    adam_eps: float = flag(1e-8, "Adam's epsilon.", gt=0, needs=_ADAM)
    sgd_momentum: float = flag(0.9, "Momentum of SGD.", ge=0, lt=1, needs=Needs(("optimizer",), value="sgd"))
    clip_grad: float = flag(1.0, "Scale gradients down to this norm over all parameters; 0: never.", ge=0)
    use_distributed_optimizer: bool | None = flag(
        None,
        "Shard main weights and moments over the data-parallel x context-parallel ranks. Saves memory; the result is "
        "the same. Unset: yes on GPUs with --optimizer adam and more than one such rank, no on a CPU.",
    )
    optimizer_cpu_offload: bool = flag(
        False,
        "Keep Adam's moments, and with bf16 the fp32 main weights, in pinned host memory. Each step moves them "
        "through the GPU in parts. The result is the same to the last bit.",
    )
    moe_aux_loss_coeff: float = flag(
        0.0,
        "Mixture of experts: coefficient of each layer's auxiliary loss for load balancing. It is computed per "
        "micro-batch and weighted by the micro-batch's share of the step's tokens, so it is the one loss that depends "
        "on how a step is split into micro-batches.",
        ge=0,
    )
    moe_z_loss_coeff: float = flag(
        0.0, "Mixture of experts: coefficient of each layer's mean squared log-sum-exp of router logits.", ge=0
    )
    moe_router_bias_update_rate: float = flag(
        0.0,
        "Mixture of experts with a router bias: how far one optimizer step moves each expert's bias against its load "
        "over the whole step. 0: the bias stays as it is (Megatron's own default is 0.001).",
        ge=0,
    )
    bf16: bool | None = flag(None, "bf16 with fp32 main weights; unset: yes on CUDA, no (fp32) on a CPU.")
    fp16: bool = flag(False, "fp16; refused: RL's log-prob ratios need bf16 or fp32.")
    accumulate_allreduce_grads_in_fp32: bool = flag(True, "Reduce gradients in fp32 (always so here).")
    attention_softmax_in_fp32: bool = flag(True, "Compute softmax in fp32 (always so here).")


@dataclass(frozen=True, kw_only=True)
class MegatronRunOptions:
    """Megatron's flags for loading, saving and seeds."""

    seed: int = flag(1234, "Seed of weight init and dropout.", ge=0)
    no_load_optim: bool = flag(False, "Load the weights only; optimizer and schedule start from zero.")
    no_load_rng: bool = flag(False, "Start with the seed's RNG states instead of the checkpoint's.")
    no_save_optim: bool = flag(
        False, "Save the weights without optimizer and schedule. Resume such a checkpoint with --no-load-optim."
    )
    finetune: bool = flag(False, "Load weights only, and start at rollout 0.")
    ckpt_format: Literal["torch_dist"] = flag("torch_dist", "Checkpoint format.")
    ckpt_step: int | None = flag(None, "Load this rollout's checkpoint instead of the newest.", ge=0)
