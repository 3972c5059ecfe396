"""The resolved plan as text: who sits where, and the arithmetic of batches. `--dry-run` prints it and stops.

Path: after `parse`; nothing reads it but the user. Invariant: it is made from args alone, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime.config.args import Args
from slime.config.epochs import planned_prompts, rollouts_of_epochs
from slime.config.problem import Problem
from slime.core.architecture import padded_vocab_size

Row = tuple[str, str]


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _devices(args: Args) -> Iterable[Row]:
    """One row a data-parallel rank, then one an engine. Megatron's order of ranks: TP, CP, DP, PP."""
    block = args.tensor_model_parallel_size * args.context_parallel_size
    replicas = 0 if args.debug_rollout_only else args.data_parallel_size
    for replica in range(replicas):
        stages = range(args.pipeline_model_parallel_size)
        ranks = ",".join(_range((stage * replicas + replica) * block, block) for stage in stages)
        yield f"train {ranks}", f"data-parallel rank {replica}: {_model_parallel(args)}"
    first = 0 if args.colocate else args.actor_world_size
    size = args.rollout_num_gpus_per_engine
    embedded = args.rollout_engine == "embedded"
    for engine in range(args.num_engines):
        slots = _range(first + engine * size, size)
        if args.rollout_external_engines:
            yield f"engine {engine}", f"{args.rollout_external_engines[engine]} (runs already)"
            continue
        kind = "embedded here; SGLang where CUDA is" if embedded else "SGLang"
        shared = "shared with training, " if args.colocate else ""
        yield f"serve {slots}", f"engine {engine}: TP {size} ({shared}{kind})"


def _model_parallel(args: Args) -> str:
    parts = [f"TP {args.tensor_model_parallel_size}"]
    if args.sequence_parallel and args.tensor_model_parallel_size > 1:
        parts.append("sequence parallel")
    parts += [f"CP {args.context_parallel_size}", f"PP {args.pipeline_model_parallel_size}"]
    return ", ".join(parts)


def _model(args: Args) -> Iterable[Row]:
    shape = args.architecture
    if shape is None:
        yield "model", "unknown (see the warnings)"
        return
    yield "model", f"{shape.family}, {shape.num_parameters() / 1e6:,.1f} M parameters"
    yield (
        "layers",
        f"{shape.num_layers} x hidden {shape.hidden_size}, MLP {shape.ffn_hidden_size}, "
        f"{shape.num_attention_heads} heads of {shape.kv_channels}, {shape.num_query_groups} KV heads",
    )
    padded = padded_vocab_size(shape.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    tied = "tied" if shape.tied_embeddings else "untied"
    yield "vocabulary", f"{shape.vocab_size}, padded to {padded} for training, {tied}"
    rotary = f"base {shape.rotary_base:g}, {shape.rotary_percent:.0%} of a head"
    yield "rotary", rotary + (", interleaved" if shape.rotary_interleaved else "")
    yield "precision", "bf16 with fp32 main weights" if args.bf16 else "fp32 (no CUDA here, or --no-bf16)"
    if args.num_engines:
        engines = args.sglang.get("dtype") or ("bfloat16" if args.bf16 else "float32")
        yield "engines", f"{engines}; alarm where mean |train - rollout log-prob| is above {args.logprob_gap_alarm:g}"


def _length(args: Args) -> str:
    if args.num_rollout is not None:
        return f"{args.num_rollout} rollouts"
    num_prompts = planned_prompts(args)
    if num_prompts is None:
        return f"{args.num_epoch} epochs"
    rollouts = rollouts_of_epochs(args, num_prompts)
    return f"{args.num_epoch} epochs of {num_prompts} rows: {rollouts} rollouts (fewer where prompts are too long)"


def _batches(args: Args) -> Iterable[Row]:
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    yield "run", f"{_length(args)} from {args.prompt_data or args.data_source_path}"
    yield (
        "rollout",
        f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} samples = {samples} samples, "
        f"up to {args.rollout_max_response_len} tokens each, temperature {args.rollout_temperature:g}",
    )
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
        yield "micro-batch", f"up to {budget} tokens ({product}), padding counted; a longer sample stands alone"
    else:
        yield "micro-batch", f"{args.micro_batch_size} samples"


def _algorithm(args: Args) -> Iterable[Row]:
    if args.loss_type == "sft_loss":
        yield "loss", "sft_loss"
    else:
        kl = f"KL {args.kl_loss_coef:g} ({args.kl_loss_type})" if args.use_kl_loss and args.kl_loss_coef else "no KL"
        clip = f"clip {args.eps_clip:g}/{args.eps_clip_high:g}"
        yield "loss", f"{args.loss_type}, {args.advantage_estimator}, {clip}, {kl}, entropy {args.entropy_coef:g}"
        yield "reward", args.custom_rm_path or args.rm_type or "by metadata.rm_type"
    mean = "over tokens" if args.calculate_per_token_loss else "over samples of each sample's mean"
    yield "mean", mean
    yield "optimizer", f"{args.optimizer}, lr {args.lr:g} ({args.lr_decay_style}), weight decay {args.weight_decay:g}"


def _files(args: Args) -> Iterable[Row]:
    if args.debug_rollout_only:
        yield "weights", f"{args.hf_checkpoint or '(not given)'}, as the engines load them"
        yield "logs", args.log_dir or "(not given)"
    else:
        yield "load", args.load or "(not given)"
        yield "ref load", args.ref_load or "(not given)"
        often = f"every {args.save_interval} rollouts and " if args.save_interval else ""
        yield "save", f"{args.save}, {often}after the last" if args.save else "(not given)"
    data = " ".join(args.eval_prompt_data) or args.eval_config
    if data and args.num_engines:
        often = f"every {args.eval_interval} rollouts, " if args.eval_interval else ""
        yield "evaluation", f"{often}before the first and after the last, on {data}"
        yield (
            "",
            f"{args.n_samples_per_eval_prompt} samples a prompt, up to {args.eval_max_response_len} tokens each, "
            f"temperature {args.eval_temperature:g}, top-p {args.eval_top_p:g}",
        )


def format_plan(args: Args, problems: Sequence[Problem]) -> str:
    """The plan, section by section, and the warnings last."""
    place = "CPU processes here" if args.rollout_engine == "embedded" else "GPUs"
    nodes = f"{args.actor_num_nodes} node{'s' if args.actor_num_nodes > 1 else ''}"
    sections = {
        "Model": _model(args),
        f"Devices ({place}; {nodes} x {args.actor_num_gpus_per_node} for training)": _devices(args),
        "Batches": _batches(args),
        "Training": _algorithm(args),
        "Files": _files(args),
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<14} {text}" for name, text in rows)]
    if problems:
        lines += ["", "Warnings", *(f"  {problem}" for problem in problems)]
    return "\n".join(lines[1:])
