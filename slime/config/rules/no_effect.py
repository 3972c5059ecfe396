"""The rule that warns about every flag without effect, so that no flag is ignored silently.

- Used by: `rules.check`. A flag that only needs another flag declares that itself (`flags.flag.Needs`); the table
  has the other cases.
- Invariant: there are warnings only about flags that were given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from slime.config.args import Args
from slime.config.flags.algo_options import CriticOptions
from slime.config.flags.flag import Needs
from slime.config.problem import Problem
from slime.config.resolve import for_gpus, gpu_memory, joins_ray
from slime.config.rules.case import Case, NoEffect
from slime.config.rules.no_effect_algorithms import ALGORITHMS
from slime.config.sharding import optimizer_ranks

_CRITIC = tuple(f.name for f in fields(CriticOptions))


TABLE: tuple[NoEffect, ...] = (
    *ALGORITHMS,
    NoEffect(
        ("micro_batch_size",),
        lambda a: a.use_dynamic_batch_size,
        "--use-dynamic-batch-size fills micro-batches by tokens",
    ),
    NoEffect(
        ("sequence_parallel",),
        lambda a: a.sequence_parallel and a.tensor_model_parallel_size == 1,
        "there is no tensor parallelism to share sequences over",
    ),
    NoEffect(
        ("use_routing_replay",),
        lambda a: a.use_routing_replay and a.loss_type == "sft_loss",
        "--loss-type sft_loss trains on texts that no engine generated",
    ),
    NoEffect(
        ("lr",),
        lambda a: a.lr == 0 and a.num_rollout != 0 and not a.debug_rollout_only,
        "no weight ever changes",
        "raise it",
    ),
    NoEffect(_CRITIC, lambda a: not a.uses_critic, "there is no critic; it belongs to --advantage-estimator ppo"),
    NoEffect(("weight_decay",), lambda a: a.lr == 0 and a.weight_decay > 0, "it is multiplied by --lr, which is 0"),
    NoEffect(
        ("weight_decay",),
        lambda a: a.weight_decay_incr_style != "constant",
        "--weight-decay-incr-style goes from --start-weight-decay to --end-weight-decay",
    ),
    NoEffect(
        ("lr_warmup_init",),
        lambda a: a.lr_warmup_iters == 0 and not a.lr_warmup_fraction,
        "there is no warm-up",
        "add --lr-warmup-iters or --lr-warmup-fraction",
    ),
    NoEffect(
        ("override_opt_param_scheduler",),
        lambda a: not a.override_opt_param_scheduler,
        "a resumed run follows the flags' schedule or the checkpoint's",
        "give --use-checkpoint-opt-param-scheduler for the checkpoint's",
    ),
    NoEffect(
        ("balance_data",),
        lambda a: a.balance_data and a.data_parallel_size == 1,
        "there is only one data-parallel rank",
    ),
    NoEffect(
        ("rollout_shuffle",),
        lambda a: a.rollout_shuffle and (a.num_rollout == 0 or a.debug_train_only),
        "no training prompts are read",
    ),
    NoEffect(
        ("num_epoch",),
        lambda a: a.num_epoch is not None and a.num_rollout == 0,
        "--num-rollout 0 only evaluates",
    ),
    NoEffect(
        ("over_sampling_batch_size",),
        lambda a: a.over_sampling_batch_size == a.rollout_batch_size,
        "it equals --rollout-batch-size, so no additional prompts are sampled",
        "raise it, or leave it out",
    ),
    NoEffect(("rm_url",), lambda a: a.custom_rm_path is not None, "--custom-rm-path judges instead of remote_rm"),
    NoEffect(
        ("rm_url", "rm_concurrency"),
        lambda a: a.custom_rm_path is None and not a.may_ask_judge,
        "it belongs to --rm-type remote_rm",
        "leave it out, unless the metadata.rm_type of a data row is remote_rm",
    ),
    NoEffect(
        ("rm_type",),
        lambda a: a.custom_rm_path is not None,
        "--custom-rm-path judges instead",
        "leave one of the two out",
    ),
    NoEffect(
        ("gpu_memory",),
        lambda a: not (for_gpus(a) or joins_ray()),
        "this machine has no CUDA, and a run on a CPU needs no GPU memory",
        "leave it out; with --dry-run it plans for GPUs",
    ),
    NoEffect(
        ("memory_check",),
        lambda a: not a.memory_check and gpu_memory(a) is None,
        "the memory of the GPUs is unknown, so nothing is checked",
    ),
    NoEffect(
        ("use_distributed_optimizer",),
        lambda a: a.use_distributed_optimizer is True and optimizer_ranks(a) < 2,
        "no two ranks hold the same weights, so there is nothing to shard",
    ),
    NoEffect(
        ("rollout_num_gpus", "rollout_external_engines", "sglang_router_ip", "sglang_router_port"),
        lambda a: a.debug_train_only,
        "--debug-train-only starts no engine",
    ),
    NoEffect(
        ("rollout_engine", "rollout_num_gpus_per_engine"),
        lambda a: bool(a.rollout_external_engines),
        "--rollout-external-engines already run with their own settings",
    ),
    NoEffect(
        ("update_weight_transport", "update_weight_buffer_size", "update_weight_pause"),
        lambda a: not a.num_engines or a.debug_rollout_only,
        "no weights are sent",
    ),
    NoEffect(
        ("update_weight_pause",),
        lambda a: not a.rollouts_ahead and a.num_engines > 0 and not a.debug_rollout_only and a.has_usual_rollout,
        "train.py has no request in flight while weights change",
        "leave it out, or start train_async.py",
    ),
    NoEffect(
        ("update_weight_disk_dir",),
        lambda a: not a.writes_weight_files,
        "no weights are written to files",
        "add --update-weight-transport disk",
    ),
    NoEffect(
        ("eval_prompt_data", "eval_config", "eval_interval"),
        lambda a: a.debug_train_only,
        "--debug-train-only starts no engine, and evaluation needs one",
    ),
    NoEffect(
        (
            "eval_function_path",
            "eval_rm_type",
            "eval_max_response_len",
            "eval_temperature",
            "eval_top_p",
            "eval_top_k",
            "eval_failed_as",
            "n_samples_per_eval_prompt",
        ),
        lambda a: a.validates,
        "SFT without engines evaluates by the loss, and nothing is generated",
    ),
    NoEffect(
        ("eval_function_path",),
        lambda a: a.debug_train_only or (not a.eval_prompt_data and a.eval_config is None),
        "it is never called, because nothing is evaluated",
        "add --eval-prompt-data or --eval-config",
    ),
    NoEffect(
        ("keep_last_checkpoints", "keep_best_checkpoint", "save_hf", "save_interval_minutes"),
        lambda a: a.save_interval == 0,
        "--save-interval 0 saves no checkpoint",
        "leave one of the two out",
    ),
    NoEffect(
        ("run_name",),
        lambda a: not a.needs_directory and not a.use_wandb,
        "it names the directory of a run without --save, and the run in W&B",
    ),
    NoEffect(
        ("load", "ref_load"),
        lambda a: a.debug_rollout_only,
        "--debug-rollout-only has no trainer, and the engines generate with --hf-checkpoint",
        "convert it and name it as --hf-checkpoint",
    ),
    NoEffect(
        (
            *("save_interval", "save_interval_minutes", "save_hf", "keep_last_checkpoints", "keep_best_checkpoint"),
            "save_debug_train_data",
        ),
        lambda a: a.debug_rollout_only,
        "--debug-rollout-only trains nothing and saves no checkpoint",
    ),
    NoEffect(
        ("keep_best_checkpoint",),
        lambda a: a.num_rollout == 0 and not a.debug_rollout_only,
        "--num-rollout 0 saves no checkpoint",
    ),
    NoEffect(
        ("num_gpus_per_node",), lambda a: True, "placement uses the number of GPUs that Ray reports for each node"
    ),
    NoEffect(
        (
            "decoder_last_pipeline_num_layers",
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
        ),
        lambda a: a.pipeline_model_parallel_size == 1,
        "--pipeline-model-parallel-size is 1: the one stage has all layers",
    ),
    NoEffect(
        ("lr_decay_iters",),
        lambda a: a.lr_decay_style == "constant" and not a.lr_warmup_fraction,
        "--lr-decay-style constant decays nothing",
    ),
    NoEffect(
        ("min_lr",),
        lambda a: a.lr_decay_style == "constant",
        "--lr-decay-style constant decays nothing",
    ),
    NoEffect(
        ("check_for_nan_in_loss_and_grad",),
        lambda a: not a.check_for_nan_in_loss_and_grad,
        "a step that is not finite never changes a weight",
        "to continue without such steps, give --bad-step-action skip",
    ),
    NoEffect(("seq_length",), lambda a: True, "samples are packed with their own lengths"),
    NoEffect(
        ("attention_backend",),
        lambda a: not (for_gpus(a) or joins_ray()),
        "this machine has no CUDA, and attention on a CPU is PyTorch's SDPA",
    ),
    NoEffect(("no_rope_fusion",), lambda a: not a.no_rope_fusion, "RoPE is never fused"),
    NoEffect(
        ("accumulate_allreduce_grads_in_fp32",),
        lambda a: not a.accumulate_allreduce_grads_in_fp32,
        "gradients are always in fp32",
    ),
    NoEffect(("attention_softmax_in_fp32",), lambda a: not a.attention_softmax_in_fp32, "softmax is always in fp32"),
    NoEffect(
        ("rollout_num_gpus_per_engine",),
        lambda a: a.engines_on_cpu and a.rollout_num_gpus_per_engine > 1,
        "this machine has no CUDA, and an embedded engine is always one process",
        "nothing to do; with CUDA it is SGLang's tensor-parallel size",
    ),
)


def no_effect(case: Case) -> Iterable[Problem]:
    """Warn about each given flag that has no effect."""
    values = vars(case.args)
    for item in fields(Args):
        needs: Needs | None = item.metadata.get("needs")
        if item.name not in case.given or needs is None or (needs.when_on and not values[item.name]):
            continue
        if needs.missing(values):
            yield case.warning(item.name, f"no effect: {needs.reason}", needs.remedy)
    for row in TABLE:
        if row.when(case.args):
            for field in row.fields:
                if field in case.given:
                    yield case.warning(field, f"no effect: {row.why}", row.remedy)
    unread = [name for name in case.args.sglang if not case.args.engine.reads(name)]
    if case.args.rollout_external_engines:
        unused = [name for name in case.args.sglang if name != "api_key"]
        yield from _passed_on_to_nobody("sglang", unused, "--rollout-external-engines already run")
    elif unread:
        kind = case.args.rollout_engine
        names = " ".join("--sglang-" + name.replace("_", "-") for name in unread)
        yield Problem(
            severity="warning",
            where=names,
            rule=f"no effect: this run uses {kind} engines (no CUDA, or --rollout-engine {kind})",
            remedy="nothing to do; runs with SGLang pass them on",
        )
    if case.args.sglang_router_ip is not None:
        unused = [name for name in case.args.router if name not in ("api_key", "control_plane_api_keys")]
        yield from _passed_on_to_nobody("router", unused, "the router already runs")
    if "cp_comm_type" in case.args.megatron_extra:
        yield Problem(
            severity="warning",
            where="--cp-comm-type",
            rule="no effect: context parallelism always gathers keys and values",
            remedy="leave it out",
        )
    moe = [name for name in case.args.megatron_extra if name.startswith("moe_")]
    if moe and not case.args.num_experts:
        names = " ".join("--" + name.replace("_", "-") for name in moe)
        yield Problem(
            severity="warning",
            where=names,
            rule="no effect: the model has no experts (--num-experts)",
            remedy="leave them out",
        )


def _passed_on_to_nobody(source: str, names: list[str], why: str) -> Iterable[Problem]:
    if names:
        flags = " ".join(f"--{source}-" + name.replace("_", "-") for name in names)
        yield Problem(severity="warning", where=flags, rule=f"no effect: {why}", remedy="leave them out")
