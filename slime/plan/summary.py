"""The resolved plan as text: devices, batches, memory and files. `--dry-run` prints it and stops.

- Used by: train.py after `parse`; only the user reads the text.
- Invariant: it depends only on args and can be made on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime.config.args import Args
from slime.config.epochs import planned_prompts, rollouts_of_epochs
from slime.config.eval_data import eval_datasets
from slime.config.experts import why_not_grouped
from slime.config.object_store import LEAST as OBJECT_STORE
from slime.config.object_store import rollout_bytes
from slime.config.pipeline_stages import count_multiple, num_chunks, stage_layers
from slime.config.problem import Problem, show
from slime.config.resolve import OUTPUTS, counts_gpus, for_gpus, gpu_memory
from slime.config.resuming import changed_flags, resumed_checkpoint
from slime.core.architecture import Architecture, padded_vocab_size
from slime.core.printable import SENTENCE, printable
from slime.observability.console.text import wrapped
from slime.plan.fit import comparison, recompute_hint
from slime.plan.memory_model import (
    CUDA_CONTEXT,
    engine_memory,
    train_memory,
    turns,
)
from slime.plan.memory_notes import activations_note, host_note, optimizer_note, sglang_note

Row = tuple[str, str]

MAX_ROWS = 64
"""The largest number of ranks or engines that are listed one by one."""

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _shown(count: int) -> Iterable[int | None]:
    """Return the numbers below `count`; if they are too many, the first ones and the last, with None between them."""
    return range(count) if count <= MAX_ROWS else (*range(MAX_ROWS - 1), None, count - 1)


def _devices(args: Args) -> Iterable[Row]:
    """Yield one row per data-parallel rank, then one per engine. Megatron orders ranks by TP, CP, DP, PP."""
    block = args.tensor_model_parallel_size * args.context_parallel_size
    replicas = 0 if args.debug_rollout_only else args.data_parallel_size
    for replica in _shown(replicas):
        if replica is None:
            yield "...", f"{replicas - MAX_ROWS} more data-parallel ranks like these"
            continue
        stages = range(args.pipeline_model_parallel_size)
        ranks = ",".join(_range((stage * replicas + replica) * block, block) for stage in stages)
        yield f"train {ranks}", f"data-parallel rank {replica}: {_model_parallel(args)}"
    if args.colocate and args.num_engines:
        yield "colocation", "training and generation share these devices; for their own, give --rollout-num-gpus N"
    first = 0 if args.colocate or args.debug_rollout_only else args.actor_world_size
    size = args.rollout_num_gpus_per_engine
    for engine in _shown(args.num_engines):
        if engine is None:
            yield "...", f"{args.num_engines - MAX_ROWS} more engines like these"
            continue
        slots = _range(first + engine * size, size)
        if args.rollout_external_engines:
            yield f"engine {engine}", f"{args.rollout_external_engines[engine]} (runs already)"
            continue
        shared = "shared with training, " if args.colocate else ""
        yield f"serve {slots}", f"engine {engine}: TP {size} ({shared}{args.engine.label})"


def _model_parallel(args: Args) -> str:
    parts = [f"TP {args.tensor_model_parallel_size}"]
    if args.sequence_parallel and args.tensor_model_parallel_size > 1:
        parts.append("sequence parallel")
    parts += [f"CP {args.context_parallel_size}", f"PP {args.pipeline_model_parallel_size}"]
    if args.num_experts:
        parts.append(f"experts EP {args.expert_model_parallel_size}, TP {args.expert_tensor_size}")
    return ", ".join(parts)


def _model(args: Args) -> Iterable[Row]:
    arch = args.architecture
    if arch is None:
        yield "model", "unknown (see the warnings)"
        return
    active = f", {arch.num_active_parameters() / 1e6:,.1f} M of them for each token" if arch.num_experts else ""
    yield "model", f"{arch.family}, {arch.num_parameters() / 1e6:,.1f} M parameters{active}"
    mlp = "" if arch.num_moe_layers == arch.num_layers else f"MLP {arch.ffn_hidden_size}, "
    yield (
        "layers",
        f"{arch.num_layers} x hidden {arch.hidden_size}, {mlp}"
        f"{arch.num_attention_heads} heads of {arch.kv_channels}, {arch.num_query_groups} KV heads",
    )
    if arch.num_experts:
        layers = f"in the last {arch.num_moe_layers}" if arch.first_dense_layers else "in all"
        shared = arch.shared_expert_ffn_hidden_size
        with_shared = f", and a shared one of {shared}" if shared else ""
        yield (
            "experts",
            f"{arch.num_experts} of {arch.moe_ffn_hidden_size} channels {layers} layers, "
            f"{arch.moe_router_topk} for each token{with_shared}",
        )
        yield "experts run", _experts_run(args, arch)
    if args.pipeline_model_parallel_size > 1:
        stages = ", ".join(str(layers) for layers in stage_layers(args, arch))
        parts = f", each in {num_chunks(args)} virtual stages" if num_chunks(args) > 1 else ""
        yield "stages", f"{stages} layers{parts}; the embedding on the first, the output layer on the last"
        if parts:
            yield "micro-batches", f"a multiple of {count_multiple(args)} on each rank; empty ones fill a step up"
    padded = padded_vocab_size(arch.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    tied = "tied" if arch.tied_embeddings else "untied"
    yield "vocabulary", f"{arch.vocab_size}, padded to {padded} for training, {tied}"
    rotary = f"base {arch.rotary_base:g}, {arch.rotary_percent:.0%} of a head"
    yield "rotary", rotary + (", interleaved" if arch.rotary_interleaved else "")
    yield "precision", "bf16 with fp32 main weights" if args.bf16 else "fp32 (no CUDA here, or --no-bf16)"
    if args.num_engines:
        engines = args.sglang.get("dtype") or ("bfloat16" if args.bf16 else "float32")
        yield "engines", f"{engines}; alarm when mean |train - rollout log-prob| is above {args.logprob_gap_alarm:g}"


def _experts_run(args: Args, arch: Architecture) -> str:
    """Return how the experts of a rank run: as grouped matrix products, or the reason why not."""
    if not args.megatron_extra.get("moe_grouped_gemm"):
        return "one after the other; --moe-grouped-gemm runs them together"
    channels = (arch.hidden_size, arch.moe_ffn_hidden_size // args.expert_tensor_size)
    reason = why_not_grouped(on_cuda=for_gpus(args), bf16=bool(args.bf16), channels=channels)
    return "together, as grouped matrix products" if reason is None else f"one after the other: {reason}"


def _memory(args: Args) -> Iterable[Row]:
    """Yield a column for the training rank with most memory, one for an engine's GPU, and notes on what they count."""
    on_cuda = counts_gpus(args)
    train, engine = train_memory(args, on_cuda=on_cuda), engine_memory(args)
    if train is None and engine is None:
        yield "", "not estimated: the model is unknown (see the warnings); so it is not compared with a GPU's memory"
        return
    context = CUDA_CONTEXT if on_cuda else 0
    largest = max(memory.peak for memory in (train, engine) if memory is not None) + context
    unit, size = next((unit for unit in UNITS if largest >= unit[1]), UNITS[-1])

    def line(train_bytes: int | None, engine_bytes: int | None, note: str = "") -> str:
        cells = ["-" if count is None else f"{count / size:,.1f}" for count in (train_bytes, engine_bytes)]
        return f"{cells[0]:>9} {cells[1]:>9}  {note}".rstrip()

    yield unit, f"{'train':>9} {'engine':>9}  a {'GPU' if on_cuda else 'process'}"
    yield "weights", line(train and train.weights, engine and engine.weights)
    if train is not None:
        yield "gradients", line(train.gradients, None, "fp32")
        yield "optimizer", line(train.optimizer, None, optimizer_note(args, on_cuda))
        if train.reference:
            where = "in host memory" if on_cuda else "and a copy of the actor while it runs"
            yield "reference", line(None if on_cuda else train.reference, None, where)
        if train.critic:
            yield "critic", line(train.critic, None, "a second model: weights, gradients and optimizer")
        yield "activations", line(train.activations, None, activations_note(args, train))
        if train.log_probs:
            logits = f"logits of {args.log_probs_chunk_size:,} tokens" + (" and kept ones" if on_cuda else "")
            note = f"while they run backward: {logits}, the output layer's gradient"
            yield "log-probs", line(train.log_probs, None, note)
        yield "layers", line(train.layers, None, "while they run backward, later: gradients, recomputed activations")
    if engine is not None:
        note = f"{engine.requests} requests of {engine.request_tokens:,} tokens, prompts not counted"
        yield "KV cache", line(None, engine.kv, note)
    if context:
        yield "CUDA", line(train and context, engine and context, "context, NCCL's buffers, workspaces: an estimate")
    moments = {"forward": "forward of old or reference log-probs, or of values", "step": "training step"}
    peaks = train.peaks.items() if train is not None and len(train.peaks) > 1 else ()
    fullest = ", ".join(f"{moments[name]} {(count + context) / size:,.1f}" for name, count in peaks)
    yield "at most", line(train and train.peak + context, engine and engine.peak + context, fullest)
    if train is not None and train.host:
        yield "host memory", line(train.host, None, host_note(args))
    if args.colocate:
        yield (
            "",
            "training and engine "
            + ("take turns on a GPU (--offload)" if args.offload else "share one GPU at the same time (--no-offload)"),
        )
    if args.colocate and on_cuda and train is not None and engine is not None:
        moments = turns(args, train, engine)
        needed = ", ".join(f"{moment} {count / size:,.1f}" for moment, count in moments.items())
        yield "", f"the GPU holds for both: {needed} {unit}"
    if engine is not None and not args.engine.on_cpu:
        yield "", sglang_note(args, engine)
    yield from _gpu_size(args, on_cuda)


def _gpu_size(args: Args, on_cuda: bool) -> Iterable[Row]:
    """Yield whether the plan fits in a GPU, if the GPU's size is known."""
    total = gpu_memory(args)
    if not on_cuda:
        yield "", "for CPU processes, in the precision above; --gpu-memory GIB plans for GPUs of that size"
    elif total is None:
        yield "", "not compared with a GPU's memory: there is no GPU here, and no --gpu-memory"
    else:
        yield "", comparison(args, total)
        hint = recompute_hint(args, total)
        if hint is not None:
            yield "", hint


def _length(args: Args) -> str:
    if args.num_rollout is not None:
        return f"{args.num_rollout} rollouts"
    epochs = "1 epoch" if args.num_epoch == 1 else f"{args.num_epoch} epochs"
    num_prompts = planned_prompts(args)
    if num_prompts is None:
        return epochs
    rollouts = rollouts_of_epochs(args, num_prompts)
    return f"{epochs} of {num_prompts} rows: {rollouts} rollouts (fewer if some prompts are too long)"


def _batches(args: Args) -> Iterable[Row]:
    samples = args.rollout_batch_size * args.resolved.n_samples_per_prompt
    yield "run", f"{_length(args)} from {show(args.prompt_data) or args.data_source_path}"
    yield (
        "rollout",
        f"{args.rollout_batch_size} prompts x {args.resolved.n_samples_per_prompt} samples = {samples} samples, "
        f"up to {args.rollout_max_response_len} tokens each, temperature {args.rollout_temperature:g}",
    )
    store = rollout_bytes(args)
    if store > OBJECT_STORE:
        yield "object store", f"up to {store / 2**30:,.1f} GiB of Ray's for rollouts on their way to the trainers"
    if args.rollouts_ahead:
        waits = "waits until it is complete" if args.update_weight_pause == "drain" else "passes between its requests"
        yield "", f"one rollout ahead: the next is generated while one trains; the weight sync {waits}"
    if args.over_sampling_batch_size != args.rollout_batch_size or args.dynamic_sampling_filter_path is not None:
        rule = args.dynamic_sampling_filter_path or "none"
        yield "sampling", f"{args.over_sampling_batch_size} prompts at first, filter: {rule}"
    yield "steps", f"{args.num_steps_per_rollout} a rollout, {args.global_batch_size} samples each"
    ranks = args.data_parallel_size
    dealt = "by estimated compute" if args.balance_data else "in order"
    yield "data parallel", f"{(args.global_batch_size or 0) / ranks:g} samples a step on each of {ranks}, dealt {dealt}"
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is not None:
        budget = args.max_tokens_per_gpu * args.context_parallel_size
        product = f"{args.max_tokens_per_gpu} x CP {args.context_parallel_size}"
        yield "micro-batch", f"up to {budget} tokens ({product}) with padding; a longer sample gets its own"
    else:
        yield "micro-batch", f"{args.micro_batch_size} samples"


def _algorithm(args: Args) -> Iterable[Row]:
    if args.loss_type == "sft_loss":
        yield "loss", "sft_loss"
    else:
        kl = f"KL {args.kl_loss_coef:g} ({args.kl_loss_type})" if args.use_kl_loss and args.kl_loss_coef else "no KL"
        if args.kl_coef:
            kl += f", KL in the reward {args.kl_coef:g}"
        clip = f"clip {args.eps_clip:g}/{args.eps_clip_high:g}"
        yield "loss", f"{args.loss_type}, {args.advantage_estimator}, {clip}, {kl}, entropy {args.entropy_coef:g}"
        yield "reward", _own_reward(args) or args.rm_type or "by metadata.rm_type"
    mean = "over tokens" if args.calculate_per_token_loss else "over samples of each sample's mean"
    yield "mean", mean
    yield "optimizer", f"{args.optimizer}, lr {args.lr:g} ({args.lr_decay_style}), weight decay {args.weight_decay:g}"


def _own_reward(args: Args) -> str:
    """Return the function of --custom-rm-path, or the sum of several: `1 * a.right + 0.1 * a.short`."""
    paths = args.reward_paths
    if len(paths) < 2:
        return "".join(paths)
    weights = args.reward_weights or (1.0,) * len(paths)
    return " + ".join(f"{weight:g} * {path}" for weight, path in zip(weights, paths, strict=False))


def _own_directory(args: Args) -> str:
    return f"{OUTPUTS}/{args.run_name or 'TIME'}/, which the run makes"


def _saves(args: Args) -> str:
    """Return where and when checkpoints are saved, and how many are kept."""
    where = args.save or _own_directory(args)
    if not args.saves:
        return f"no checkpoint ({'--save-interval 0' if args.save_interval == 0 else 'nothing is trained'})"
    often = f"every {args.save_interval} rollouts and " if args.save_interval else ""
    if args.save_interval_minutes is not None:
        often += f"every {args.save_interval_minutes:g} minutes and "
    kept = "" if args.keep_last_checkpoints is None else f"; the newest {args.keep_last_checkpoints} are kept"
    return f"{where}, {often}after the last{kept}"


def _continued(args: Args) -> Iterable[Row]:
    """Yield the checkpoint that the run continues from, and the flags that have changed since it was written."""
    resumed = resumed_checkpoint(args)
    if resumed is None:
        return
    yield "", f"continues after {resumed.path.name} with rollout {resumed.rollout_id + 1}"
    changed = changed_flags(args, resumed)
    if changed:
        yield "", f"changed since the checkpoint: {', '.join(changed)}"
    elif resumed.flags:
        yield "", "no flag has changed since the checkpoint"


def _files(args: Args) -> Iterable[Row]:
    if args.debug_rollout_only:
        yield "weights", f"{args.hf_checkpoint or '(not given)'}, as the engines load them"
        yield "logs", args.log_dir or _own_directory(args)
    else:
        yield "load", args.load or "(not given)"
        yield from _continued(args)
        yield "ref load", args.ref_load or "(not given)"
        yield "save", _saves(args)
    if (args.eval_prompt_data or args.eval_config) and (args.num_engines or args.validates):
        yield from _evaluation(args)


def _evaluation(args: Args) -> Iterable[Row]:
    """Yield when the run evaluates, then one row per set, because each may have its own sampling."""
    often = f"every {args.eval_interval} rollouts, " if args.eval_interval else ""
    yield "evaluation", f"{often}before the first and after the last"
    try:
        datasets = eval_datasets(args)
    except ValueError:  # the file is not on this machine, and a warning reports it
        yield "", f"on {' '.join([*args.eval_prompt_data, args.eval_config or ''])}".rstrip()
        return
    for dataset in datasets:
        judge = "" if dataset.rm_type in (args.rm_type, None) or args.custom_rm_path else f", {dataset.rm_type}"
        samples = (
            "1 sample" if dataset.n_samples_per_eval_prompt == 1 else f"{dataset.n_samples_per_eval_prompt} samples"
        )
        if args.validates:
            yield "", f"{dataset.name}: {show(dataset.path)}, the loss on its examples"
            continue
        yield "", f"{dataset.name}: {show(dataset.path)}{judge}"
        yield (
            "",
            f"  {samples} a prompt, up to {dataset.max_response_len} tokens each, "
            f"temperature {dataset.temperature:g}, top-p {dataset.top_p:g}",
        )


def format_plan(args: Args, problems: Sequence[Problem], data: Sequence[Row] = (), *, width: int | None = None) -> str:
    """Return the plan by section, with the warnings at the end.

    `data`: the rows of the section about the data. `width`: the columns of a line; None: lines are not broken.
    """
    place = "CPU processes here" if args.engine.on_cpu else "GPUs"
    nodes = f"{args.actor_num_nodes} node{'s' if args.actor_num_nodes > 1 else ''}"
    sections = {
        "Model": _model(args),
        f"Devices ({place}; {nodes} x {args.actor_num_gpus_per_node} for training)": _devices(args),
        "Batches": _batches(args),
        **({"Data": data} if data else {}),
        "Memory": _memory(args),
        "Training": _algorithm(args),
        "Files": _files(args),
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title, *(_line(f"  {name:<14} {printable(text, SENTENCE)}", width, 17) for name, text in rows)]
    if problems:
        lines += ["", "Warnings", *(_line(f"  {problem}", width, 4) for problem in problems)]
    return "\n".join(lines[1:])


def _line(text: str, width: int | None, indent: int) -> str:
    return text if width is None else wrapped(text, width, indent=indent)
