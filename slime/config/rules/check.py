"""The list of all rules between flags. All run, and all problems are reported at once.

- Used by: `parse`, after `resolve` and before anything starts.
- Invariant: a rule is a small function over a Case, and the table at the bottom lists every rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime.config.problem import Problem
from slime.config.rules.algorithms import critic, group_size, overlong, surrogate, teacher
from slime.config.rules.best_checkpoint import best_checkpoint
from slime.config.rules.case import Case, Rule
from slime.config.rules.deterministic import deterministic
from slime.config.rules.engines import (
    api_keys,
    engine_share,
    engines,
    external_engines,
    external_router,
    keyless_engines,
    pauses,
    precision_elsewhere,
    router_request_timeout,
    sglang,
    sglang_precision,
    weight_directory,
)
from slime.config.rules.experts import balance, experts, experts_passed_on, routing_replay, shared_expert_overlap
from slime.config.rules.files import debug_data, eval_files, files_of_rollouts, hooks, prompt_file, train_data, weights
from slime.config.rules.imports import megatron_version, trackers
from slime.config.rules.jobs import job_outputs
from slime.config.rules.megatron_fields import megatron_decided, megatron_known
from slime.config.rules.no_effect import no_effect
from slime.config.rules.not_built import not_built
from slime.config.rules.offpolicy import ahead, offpolicy, partial_rollout
from slime.config.rules.optimizer import cpu_offload, decay, optimizer, resumed_schedule, warm_up, weight_decay
from slime.config.rules.other_models import other_models
from slime.config.rules.paths import directories, path_names, quantized, tokenizer, weight_files
from slime.config.rules.replay import replay
from slime.config.rules.rewards import (
    custom_reward,
    eval_rewards,
    grammar,
    reward,
    reward_sum,
    reward_types,
    reward_url,
)
from slime.config.rules.saving import other_runs_checkpoints, own_directory, resumed_data, run_name
from slime.config.rules.simulation import simulation
from slime.config.rules.stages import pipeline_stages, recompute, virtual_stages
from slime.config.rules.templates import template_variables

__all__ = ["CONVERSION_RULES", "TRAINING_RULES", "Case", "check"]


def check(case: Case, rules: Sequence[Rule]) -> list[Problem]:
    """Return all problems that the rules find, errors first."""
    problems = [problem for rule in rules for problem in rule(case)]
    return sorted(problems, key=lambda problem: problem.severity)


# --- engines and debug modes ------------------------------------------------------------------------------------


def sglang_data_parallel(case: Case) -> Iterable[Problem]:
    """Check that data parallelism inside an SGLang engine has DP attention."""
    size = case.args.sglang.get("dp_size", 1)
    if size > 1 and not case.args.sglang.get("enable_dp_attention"):
        yield Problem(
            severity="error",
            where="--sglang-dp-size",
            value=str(size),
            rule="data parallelism inside an engine needs DP attention",
            remedy="add --sglang-enable-dp-attention, or start more engines instead",
        )


def debug_modes(case: Case) -> Iterable[Problem]:
    """Check that at most one debug mode is chosen and has its data."""
    args = case.args
    if args.debug_rollout_only and args.debug_train_only:
        yield case.error("debug_rollout_only", "cannot be combined with --debug-train-only", "leave one out")
    if args.debug_train_only and args.load_debug_rollout_data is None:
        remedy = "add --load-debug-rollout-data"
        yield case.error("debug_train_only", "has nothing to train on", remedy, also=["load_debug_rollout_data"])


# --- batch arithmetic -------------------------------------------------------------------------------------------


def length(case: Case) -> Iterable[Problem]:
    """Check that exactly one flag gives the run's length, and that there is something to do."""
    args = case.args
    if args.num_rollout is None and args.num_epoch is None:
        yield case.error("num_rollout", "not given", "give --num-rollout or --num-epoch", also=["num_epoch"])
    elif args.num_rollout and args.num_epoch is not None:  # with 0 there is no training, however long it would be
        rule = f"cannot be combined with --num-epoch {args.num_epoch}"
        yield case.error("num_rollout", rule, "leave one out", also=["num_epoch"])
    elif args.num_epoch is not None and args.prompt_data is None and not args.has_own_data_source:
        yield case.error("num_epoch", "there are no prompts to count", "add --prompt-data, or give --num-rollout")
    elif args.num_rollout == 0 and (args.debug_train_only or not case.evaluates):
        remedy = "raise it, or add --eval-prompt-data or --eval-config, without --debug-train-only"
        about = ("eval_prompt_data", "eval_config", "debug_train_only")
        yield case.error("num_rollout", "nothing to do: there is no rollout, and no evaluation", remedy, also=about)


def steps(case: Case) -> Iterable[Problem]:
    """Check that a rollout's samples split evenly into optimizer steps."""
    args = case.args
    num_steps, batch = args.resolved.num_steps_per_rollout, args.resolved.global_batch_size
    samples = args.rollout_batch_size * args.resolved.n_samples_per_prompt
    described = f"{args.rollout_batch_size} prompts x {args.resolved.n_samples_per_prompt} samples = {samples}"
    both = {"num_steps_per_rollout", "global_batch_size"} <= case.given
    about = ("num_steps_per_rollout", "global_batch_size", "rollout_batch_size", "n_samples_per_prompt")
    if num_steps * batch != samples:
        if both:
            rule = f"contradicts --num-steps-per-rollout {num_steps}: a rollout has {described}"
            yield case.error("global_batch_size", rule, "leave one of the two out", also=about)
        elif "global_batch_size" in case.given:
            rule = f"does not divide the rollout's {described}"
            yield case.error("global_batch_size", rule, "choose a divisor", also=about)
        else:
            rule = f"{described} cannot be split into that many equal steps"
            yield case.error("num_steps_per_rollout", rule, "choose a divisor", also=about)
    elif batch < args.data_parallel_size:
        rule = f"a step of {batch} samples leaves some of {args.data_parallel_size} data-parallel ranks idle"
        yield case.warning("global_batch_size", rule, "use fewer steps or fewer ranks", also=about)


def over_sampling(case: Case) -> Iterable[Problem]:
    """Check that over-sampling samples at least one rollout's prompts."""
    args = case.args
    if args.resolved.over_sampling_batch_size < args.rollout_batch_size:
        rule = f"less than --rollout-batch-size {args.rollout_batch_size}"
        yield case.error("over_sampling_batch_size", rule, "make it greater", also=["rollout_batch_size"])


def micro_batches(case: Case) -> Iterable[Problem]:
    """Check that dynamic micro-batches have a token budget."""
    if case.args.use_dynamic_batch_size and case.args.max_tokens_per_gpu is None:
        remedy = "add --max-tokens-per-gpu"
        yield case.error("use_dynamic_batch_size", "has no token budget", remedy, also=["max_tokens_per_gpu"])


# --- sampling and algorithm -------------------------------------------------------------------------------------


def training_distribution(case: Case) -> Iterable[Problem]:
    """Check that training rollouts are sampled from the whole distribution."""
    args = case.args
    if not case.trains_policy or not case.generates:
        return
    remedy = "leave it out (evaluation may use --eval-top-p and --eval-top-k)"
    why = "training rollouts must be sampled from the whole distribution, because log-probs are computed from it"
    if args.rollout_top_p < 1:
        yield case.error("rollout_top_p", why, remedy)
    if args.rollout_top_k not in (-1, 0):
        yield case.error("rollout_top_k", why, remedy)
    if args.rollout_temperature == 0:
        rule = "greedy sampling: all samples of a prompt are equal, and nothing is learned"
        yield case.warning("rollout_temperature", rule, "sample with a temperature above 0")


def stops(case: Case) -> Iterable[Problem]:
    """Check that stop texts and stop ids can occur in a response."""
    args = case.args
    if "" in args.rollout_stop:
        yield case.error("rollout_stop", "an empty text would end every response", "leave it out")
    size = None if args.architecture is None else args.architecture.vocab_size
    wrong = [token for token in args.rollout_stop_token_ids if token < 0 or (size is not None and token >= size)]
    if wrong:
        rule = f"the vocabulary has no token {', '.join(map(str, wrong))}" + (
            f": it ends at {size - 1}" if size else ""
        )
        yield case.error("rollout_stop_token_ids", rule, "correct the ids", also=["vocab_size"])


def context(case: Case) -> Iterable[Problem]:
    """Check response lengths against the context length."""
    args = case.args
    limit = args.rollout_max_context_len
    model_limit = None if args.architecture is None else args.architecture.max_position_embeddings
    if limit is not None and model_limit is not None and limit > model_limit:
        yield case.error("rollout_max_context_len", f"the model's context is {model_limit}", "lower it")
        return
    longest = model_limit if limit is None else limit
    for field in ("rollout_max_response_len", "eval_max_response_len"):
        if longest is not None and field in case.given and vars(args)[field] >= longest:
            source = "the model's context" if limit is None else "--rollout-max-context-len"
            rule = f"{source} is {longest}: a response gets only the tokens that its prompt leaves"
            yield case.warning(field, rule, "lower it", also=["rollout_max_context_len"])


def kl(case: Case) -> Iterable[Problem]:
    """Warn about a KL term without a coefficient."""
    args = case.args
    if args.use_kl_loss and args.kl_loss_coef == 0 and not args.log_ref_kl and args.loss_type != "sft_loss":
        rule = "no effect at --kl-loss-coef 0: reference KL is off, and the reference model is not run"
        yield case.warning("use_kl_loss", rule, "raise the coefficient, or add --log-ref-kl to log the KL")


def losses(case: Case) -> Iterable[Problem]:
    """Check the loss's function, the data that it trains on, and the clip range."""
    args = case.args
    if args.loss_type == "custom_loss" and args.custom_loss_function_path is None:
        yield case.error("loss_type", "has no function", "add --custom-loss-function-path")
    if args.loss_type == "sft_loss" and case.generates:
        rule = "the policy is trained on its own responses, whatever their reward"
        remedy = "for the data's responses, set --rollout-function-path slime.rollout.sft_rollout.generate_rollout"
        yield case.warning("loss_type", rule, remedy, also=["rollout_function_path"])
    if args.eps_clip_high is not None and args.eps_clip_high < args.eps_clip < 1:
        rule = f"less than --eps-clip {args.eps_clip:g}"
        yield case.warning("eps_clip_high", rule, "the upper range is meant to be the wider one", also=["eps_clip"])


def evaluation(case: Case) -> Iterable[Problem]:
    """Check that there is data to evaluate on."""
    args = case.args
    if args.eval_interval is not None and not case.evaluates:
        remedy = "add --eval-prompt-data or --eval-config"
        yield case.error("eval_interval", "nothing to evaluate on", remedy, also=["eval_prompt_data", "eval_config"])


# --- model and parallel sizes -----------------------------------------------------------------------------------


def parallel_sizes(case: Case) -> Iterable[Problem]:
    """Check that the parallel sizes divide the ranks and the model's dimensions."""
    args = case.args
    tensor, pipeline, context_size = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    world = args.actor_world_size
    about = ("actor_num_nodes", "actor_num_gpus_per_node", "pipeline_model_parallel_size", "context_parallel_size")
    if world % (tensor * pipeline * context_size):
        rule = (
            f"TP {tensor} x PP {pipeline} x CP {context_size} = {tensor * pipeline * context_size} does not divide "
            f"the {world} training GPUs"
        )
        remedy = "change a parallel size, or --actor-num-nodes x --actor-num-gpus-per-node"
        yield case.error("tensor_model_parallel_size", rule, remedy, also=about)
    arch = args.architecture
    if arch is None:
        return
    for size, name in ((arch.num_attention_heads, "attention heads"), (arch.ffn_hidden_size, "MLP channels")):
        if size % tensor:
            yield case.error("tensor_model_parallel_size", f"does not divide {size} {name}", "choose a divisor")
    if arch.num_query_groups % tensor and arch.num_attention_heads % tensor == 0:
        rule = f"does not divide the {arch.num_query_groups} KV heads, which cannot be split further"
        yield case.error("tensor_model_parallel_size", rule, "choose a divisor")
    if arch.num_attention_heads % arch.num_query_groups:
        rule = f"does not divide {arch.num_attention_heads} attention heads"
        yield case.error("num_query_groups", rule, "correct MODEL_ARGS")


def precision(case: Case) -> Iterable[Problem]:
    """Check precision and dropout."""
    args = case.args
    if args.fp16:
        yield case.error("fp16", "RL's log-prob ratios need bf16 or fp32", "use --bf16")
    if args.attention_dropout > 0:
        rule = "packed attention has no dropout, and the trainer's log-probs would differ from the engine's"
        yield case.error("attention_dropout", rule, "set it to 0")
    if args.hidden_dropout > 0:
        rule = "with dropout the trainer's log-probs differ from the engine's"
        yield case.warning("hidden_dropout", rule, "set it to 0")


CONVERSION_RULES: tuple[Rule, ...] = (quantized, parallel_sizes, precision, megatron_decided, megatron_known)
"""The rules for tools that need only the model's directory and the parallel sizes."""

TRAINING_RULES: tuple[Rule, ...] = (
    engines,
    engine_share,
    sglang,
    sglang_precision,
    precision_elsewhere,
    external_engines,
    external_router,
    router_request_timeout,
    api_keys,
    keyless_engines,
    weight_directory,
    pauses,
    ahead,
    deterministic,
    sglang_data_parallel,
    debug_modes,
    simulation,
    length,
    steps,
    over_sampling,
    partial_rollout,
    group_size,
    micro_batches,
    training_distribution,
    stops,
    context,
    kl,
    losses,
    surrogate,
    overlong,
    teacher,
    offpolicy,
    critic,
    reward_types,
    reward,
    eval_rewards,
    reward_url,
    grammar,
    custom_reward,
    reward_sum,
    evaluation,
    own_directory,
    run_name,
    other_runs_checkpoints,
    resumed_data,
    trackers,
    parallel_sizes,
    pipeline_stages,
    virtual_stages,
    experts,
    balance,
    experts_passed_on,
    shared_expert_overlap,
    routing_replay,
    recompute,
    precision,
    optimizer,
    cpu_offload,
    decay,
    warm_up,
    weight_decay,
    resumed_schedule,
    megatron_decided,
    megatron_known,
    megatron_version,
    prompt_file,
    eval_files,
    best_checkpoint,
    path_names,
    tokenizer,
    template_variables,
    directories,
    job_outputs,
    quantized,
    other_models,
    weight_files,
    weights,
    files_of_rollouts,
    debug_data,
    replay,
    train_data,
    hooks,
    no_effect,
    not_built,
)
