"""The peak memory of a device by kind, in bytes, computed from args and the model's architecture.

- Used by: `summary`, which prints it, and `fit`, which compares it with a GPU; `activations` has the table of what a
  forward pass keeps.
- Invariant: no number is fitted; tests/config/test_memory.py counts the same tensors in a running trainer.

A training rank always holds weights, gradients and optimizer state. The larger of two moments is added:

    forward   old and reference log-probs: one layer's intermediate results, or a chunk of logits
    step      all that the layers keep for the backward pass, and the working memory of the part that runs now

With colocation, engines and training take turns on the GPU, and both count at three moments (`turns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slime.config.args import Args
from slime.config.memory import EMBEDDED_ROW_STEP, EMBEDDED_RUNNING_REQUESTS
from slime.config.pipeline_stages import count_multiple, micro_batch_group, num_chunks, stage_layer_numbers
from slime.config.sharding import dense_ranks, expert_ranks
from slime.core.architecture import Architecture
from slime.plan.activations import local_vocabulary, log_probs_forward, log_probs_operation, stage_operations
from slime.plan.moe_activations import copies, experts_forward, routing_kept
from slime.plan.rank import FP32, Rank, backward_peak, forward_peak, saved_bytes

CUDA_CONTEXT = 3 * 2**29
"""An estimate of the other memory of a process on its GPU: CUDA context, NCCL's buffers and workspaces."""


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """The bytes of one rank of stage `stage`. A step holds `activations`, and either `log_probs` or `layers`."""

    stage: int
    tokens: int
    """The number of tokens in the largest pack on this rank."""
    weights: int
    gradients: int
    optimizer: int
    reference: int
    """The copy of the reference model in host memory. While it runs, the actor's copy there is as large."""
    critic: int
    """The critic's weights, gradients and optimizer, or 0. Its steps follow the policy's and keep less."""
    activations: int
    """The bytes kept for the backward pass, of all micro-batches in flight."""
    log_probs: int
    """The working memory while the log-probs run backward: a chunk of logits and the output layer's gradient."""
    layers: int
    """The working memory while the layers run backward: gradients and recomputed activations."""
    peaks: dict[str, int]
    """The device bytes at each of the two moments; without `forward` if there is no such pass."""
    host: int
    """The host bytes if the device has its own memory; otherwise `peaks` includes them.

    They are copies of models, an offloaded optimizer, and the state that waits there while engines use the device."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """The bytes on one GPU of an engine, or in the single process of an embedded engine."""

    weights: int
    kv: int
    requests: int
    """The number of requests at once in a training rollout."""
    request_tokens: int
    token: int
    """The bytes of KV cache for one token."""

    @property
    def peak(self) -> int:
        return self.weights + self.kv

    @property
    def least(self) -> int:
        """Return the bytes that it needs at least: weights and the KV cache of one request."""
        return self.weights + self.request_tokens * self.token


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters on one rank; those of experts are shared among other ranks than the rest."""

    dense: int
    experts: int
    biases: int
    """The number of values in the routers' biases, which are fp32 and not trained; each has a count of tokens."""

    @property
    def trained(self) -> int:
        return self.dense + self.experts

    def kept(self, width: int) -> int:
        """Return the bytes of the tensors that a checkpoint or a copy of the model has."""
        return width * self.trained + FP32 * self.biases

    def weights(self, width: int) -> int:
        """Return the bytes of the tensors in a model: the routers also count the tokens of each expert."""
        return self.kept(width) + FP32 * self.biases


def stage_parameters(args: Args, arch: Architecture, stage: int) -> Parameters:
    """Return the parameters on one rank of a pipeline stage. Each tensor-parallel rank has whole norms and routers."""
    tp, stages = args.tensor_model_parallel_size, stage_layer_numbers(args, arch)
    hidden, head = arch.hidden_size, arch.kv_channels
    heads = arch.num_attention_heads + 2 * arch.num_query_groups
    attention = hidden * head * (heads + arch.num_attention_heads)
    attention += head * heads if arch.add_qkv_bias else 0
    whole = hidden * (2 + arch.post_self_attn_layernorm + arch.post_mlp_layernorm)
    whole += 2 * head if arch.qk_layernorm else 0
    layers = len(stages[stage])
    moe = sum(map(arch.is_moe_layer, stages[stage]))
    mlps = 3 * hidden * ((layers - moe) * arch.ffn_hidden_size + moe * arch.shared_expert_ffn_hidden_size)
    routers = moe * arch.num_experts * hidden
    ranks = args.expert_model_parallel_size * args.expert_tensor_size
    is_first, is_last = stage == 0, stage == len(stages) - 1
    # a tied output layer is a copy of the embedding if they are on different stages
    tables = is_first + (is_last and not (arch.tied_embeddings and is_first))
    return Parameters(
        dense=(layers * attention + mlps) // tp
        + layers * whole
        + routers
        + tables * local_vocabulary(args, arch) * hidden
        + is_last * hidden,
        experts=moe * arch.num_experts * 3 * hidden * arch.moe_ffn_hidden_size // ranks,
        biases=moe * arch.num_experts if arch.router_bias else 0,
    )


def critic_parameters(args: Args, arch: Architecture, stage: int) -> Parameters:
    """Return the critic's parameters; its value head is whole on each tensor-parallel rank."""
    is_first, is_last = stage == 0, stage == args.pipeline_model_parallel_size - 1
    has_output_layer = is_last and not (arch.tied_embeddings and is_first)
    policy = stage_parameters(args, arch, stage)
    of_head = is_last * arch.hidden_size - has_output_layer * local_vocabulary(args, arch) * arch.hidden_size
    return replace(policy, dense=policy.dense + of_head)


def pack_tokens(args: Args, arch: Architecture) -> int:
    """Return the tokens of the largest pack on one context-parallel rank: the budget, or a longer single sample.

    Prompts are not known here, so a generated sample counts with its response, and a sample from data with the whole
    context.
    """
    context = args.rollout_max_context_len or arch.max_position_embeddings
    longest = min(context, args.rollout_max_response_len) if _generates(args) else context
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is not None:
        alone = -(-longest // args.context_parallel_size) if _generates(args) else 0
        tokens = max(args.max_tokens_per_gpu, alone)
    else:
        tokens = -(-longest * args.micro_batch_size // args.context_parallel_size)
    tp = args.tensor_model_parallel_size
    return -(-tokens // tp) * tp


def _generates(args: Args) -> bool:
    return args.loss_type != "sft_loss" and args.load_debug_rollout_data is None


def _in_flight(args: Args, stage: int) -> float:
    """Return the number of micro-batches whose activations a stage keeps at once (1F1B, or interleaved schedule)."""
    stages = args.pipeline_model_parallel_size
    most = max((args.global_batch_size or 1) // args.data_parallel_size, 1)  # a micro-batch has at least one sample
    chunks = num_chunks(args)
    if chunks == 1:
        return min(stages - stage, most)
    most += -most % count_multiple(args)
    return min(2 * (stages - stage - 1) + (chunks - 1) * micro_batch_group(args) + 1, most * chunks) / chunks


def train_memory(args: Args, *, on_cuda: bool) -> TrainMemory | None:
    """Return the training rank with most memory; None if nothing is trained, or if the model is unknown.

    For a mixture of experts it is the memory with balanced routing, in which every expert gets equally many tokens.
    """
    arch = args.architecture
    if arch is None or args.debug_rollout_only:
        return None
    stages = [stage_memory(args, arch, stage, on_cuda=on_cuda) for stage in range(args.pipeline_model_parallel_size)]
    return max(stages, key=lambda memory: memory.peak)


def rank_sizes(args: Args, arch: Architecture, *, on_cuda: bool, tokens: int | None = None) -> Rank:
    """Return the sizes of a training rank, for its largest pack or for `tokens` tokens."""
    tp = args.tensor_model_parallel_size
    tokens = pack_tokens(args, arch) if tokens is None else tokens
    rows = tokens // tp if args.sequence_parallel else tokens
    width = 2 if args.bf16 else FP32
    return Rank(
        arch=arch,
        tokens=tokens,
        rows=rows,
        width=width,
        tp=tp,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_size,
        on_cuda=on_cuda,
    )


def stage_memory(args: Args, arch: Architecture, stage: int, *, on_cuda: bool) -> TrainMemory:
    """Return the memory of a rank of one pipeline stage."""
    rank = rank_sizes(args, arch, on_cuda=on_cuda)
    stages = stage_layer_numbers(args, arch)
    is_last = stage == len(stages) - 1
    parameters = stage_parameters(args, arch, stage)
    weights, gradients = parameters.weights(rank.width), FP32 * parameters.trained
    optimizer, optimizer_on_host = _optimizer_bytes(args, parameters)
    reference = parameters.kept(rank.width) if args.needs_reference else 0
    of_critic = critic_parameters(args, arch, stage) if args.uses_critic else Parameters(0, 0, 0)
    critic_state, critic_on_host = _optimizer_bytes(args, of_critic)
    critic = of_critic.weights(rank.width) + FP32 * of_critic.trained + critic_state

    operations = stage_operations(args, rank, layers=stages[stage], is_first=stage == 0, is_last=is_last)
    kept = saved_bytes(operations)
    held = rank.values(arch.hidden_size) if rank.rows < rank.tokens else 0  # Megatron's buffer, never freed
    held += _held_by_dispatchers(args, rank, stages[stage])
    activations = int(_in_flight(args, stage) * kept) + held
    # the forward pass also holds the embedding and a layer's input; on a GPU, norms keep these tensors
    forward = forward_peak(operations) + (0 if on_cuda else 2 * rank.residual)
    layers = max(backward_peak(operations), forward) - kept
    log_probs = head_forward = 0
    if is_last:
        head = log_probs_operation(args, rank)
        log_probs, head_forward = head.saved + head.working, log_probs_forward(args, rank)
    static = weights + gradients + optimizer + critic
    peaks = {"step": static + activations + max(layers, log_probs)}
    if _has_forward(args):
        peaks["forward"] = static + held + max(_layer_forward(rank, stages[stage]), rank.residual + head_forward)
    host = optimizer_on_host + critic_on_host + 2 * reference
    if on_cuda and args.colocate and args.offload:
        host += weights + optimizer + of_critic.weights(rank.width) + critic_state
    copied = checkpoint_copy(args, rank.width, parameters) + checkpoint_copy(args, rank.width, of_critic)
    host += copied
    if not on_cuda:
        peaks = {moment: count + host for moment, count in peaks.items()}
    return TrainMemory(
        stage=stage,
        tokens=rank.tokens,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        critic=critic,
        activations=activations,
        log_probs=log_probs,
        layers=layers,
        peaks=peaks,
        host=host if on_cuda else 0,
    )


def checkpoint_copy(args: Args, width: int, parameters: Parameters) -> int:
    """Return the bytes of one rank's share of a checkpoint, of which a save makes a copy in host memory."""
    if args.save is None or not args.saves:
        return 0
    weights = (width * parameters.dense + FP32 * parameters.biases) // dense_ranks(args)
    weights += width * parameters.experts // expert_ranks(args) if parameters.experts else 0
    # an optimizer that is not distributed is written by all of its replicas in shares, too
    optimizer = sum(_optimizer_bytes(replace(args, use_distributed_optimizer=True), parameters))
    return weights + (0 if args.no_save_optim else optimizer)


def _held_by_dispatchers(args: Args, rank: Rank, layers: Sequence[int]) -> int:
    """Return the bytes of the last routing of all layers with experts; a critic's layers hold theirs as well."""
    once = routing_kept(rank, recomputed=args.recompute_granularity == "full")
    return sum(map(rank.arch.is_moe_layer, layers)) * once * (2 if args.uses_critic else 1)


def _layer_forward(rank: Rank, layers: Sequence[int]) -> int:
    """Return the bytes of the largest layer of a forward pass that keeps nothing."""
    mlp = rank.values(4 * rank.ffn)
    _, received = copies(rank)  # with these: what goes into an MoE layer, and what its shared expert returns
    return 3 * rank.residual + max(
        2 * rank.residual + received + experts_forward(rank) if rank.arch.is_moe_layer(layer) else mlp
        for layer in layers
    )


def turns(args: Args, train: TrainMemory, engine: EngineMemory) -> dict[str, int]:
    """Return the bytes of a GPU that a trainer and an engine share, at each moment; both processes always exist.

    During the weight sync, the trainer's gradients and optimizer are offloaded and the engine has no KV cache yet.
    There are two buckets: one is filled while the other is read.
    """
    contexts = 2 * CUDA_CONTEXT
    if not args.offload:
        return {"always": train.peak + engine.peak + contexts}
    sent = train.weights + engine.weights + 2 * args.update_weight_buffer_size
    moments = {"training": train.peak, "weights sent": sent, "generating": engine.peak}
    return {moment: size + contexts for moment, size in moments.items()}


def _has_forward(args: Args) -> bool:
    """Return whether a forward pass without backward is needed: for reference, old policy or the critic's values."""
    several_steps = (args.num_steps_per_rollout or 1) > 1 and args.loss_type != "sft_loss"
    return args.needs_reference or several_steps or args.uses_critic


def _optimizer_bytes(args: Args, parameters: Parameters) -> tuple[int, int]:
    """Return the optimizer's bytes on the device and in host memory: moments, and fp32 main weights with bf16."""
    main = FP32 if args.bf16 else 0
    moments = 2 * FP32 if args.optimizer == "adam" else FP32 if args.sgd_momentum > 0 else 0
    dense, experts = ((main + moments) * count for count in (parameters.dense, parameters.experts))
    if args.use_distributed_optimizer:
        dense //= dense_ranks(args)
        experts //= expert_ranks(args) if experts else 1
    size = dense + experts
    return (0, size) if args.optimizer_cpu_offload else (size, 0)


def _engine_weights(arch: Architecture, width: int, tp: int) -> int:
    """Return the bytes of weights on one of `tp` GPUs of an engine, each of which has whole routers.

    --sglang-ep-size changes nothing: a GPU has whole experts, or a part of each, but always 1/TP of them together.
    """
    routers = arch.num_moe_layers * arch.num_experts * arch.hidden_size
    biases = arch.num_moe_layers * arch.num_experts if arch.router_bias else 0
    return width * ((arch.num_parameters() - routers) // tp + routers) + FP32 * biases


def engine_memory(args: Args) -> EngineMemory | None:
    """Return the memory of one GPU of an engine in a training rollout; None without engines or with unknown model."""
    arch = args.architecture
    if arch is None or not args.num_engines:
        return None
    embedded = args.engine.on_cpu
    tp = 1 if embedded else args.rollout_num_gpus_per_engine
    width = 2 if str(args.sglang.get("dtype") or ("bfloat16" if args.bf16 else "float32")).endswith("16") else FP32
    samples = (args.over_sampling_batch_size or args.rollout_batch_size) * args.resolved.n_samples_per_prompt
    running = args.sglang.get("max_running_requests") or (EMBEDDED_RUNNING_REQUESTS if embedded else samples)
    requests = min(-(-samples // args.num_engines), args.sglang_server_concurrency, running)
    context = args.rollout_max_context_len or arch.max_position_embeddings
    tokens = min(args.rollout_max_response_len, args.sglang.get("context_length") or context, context)
    if embedded:
        tokens = -(-tokens // EMBEDDED_ROW_STEP) * EMBEDDED_ROW_STEP
    limit = args.sglang.get("max_total_tokens")
    if limit is not None:
        requests = min(requests, max(limit // tokens, 1))
    kv_width = 1 if str(args.sglang.get("kv_cache_dtype", "")).startswith("fp8") else width
    kv_heads = max(arch.num_query_groups // tp, 1)
    kv_token = 2 * arch.num_layers * kv_heads * arch.kv_channels * kv_width
    return EngineMemory(
        weights=_engine_weights(arch, width, tp),
        kv=requests * tokens * kv_token,
        requests=requests,
        request_tokens=tokens,
        token=kv_token,
    )
