"""slime's own flags: one frozen dataclass a section, one field a flag, its help beside it.

Path: `parse` fills these from argv and YAML, `rules` resolves and checks them, and everything below reads
one frozen `Args` (`config.args`). Invariant: no default lives anywhere else; `None` means "not given", and
`rules.resolve` replaces it where another value decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags.flag import flag


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Who runs where."""

    actor_num_nodes: int = flag(1, "Nodes for training.", ge=1, le=65536)
    actor_num_gpus_per_node: int = flag(1, "GPUs (on a CPU: worker processes) for training, a node.", ge=1, le=1024)
    rollout_num_gpus: int | None = flag(
        None,
        "GPUs (on a CPU: engine processes) for generation. 0: no engines, for runs that generate nothing.",
        ge=0,
        le=1048576,
    )
    rollout_num_gpus_per_engine: int = flag(1, "GPUs of one engine; SGLang's tensor parallel size.", ge=1, le=65536)
    num_gpus_per_node: int = flag(8, "Accepted without effect: Ray knows what each node has.", ge=1, le=1024)
    gpu_memory: float | None = flag(
        None,
        "GiB of one GPU, which what is planned has to fit in (an H100 has 79.6); unset: this machine's GPUs' own. With "
        "--dry-run, plans for GPUs of that size also where there are none.",
        ge=0.1,
        le=100_000,
        metavar="GIB",
    )
    memory_check: bool = flag(
        True, "A plan that needs more memory than a GPU has is an error; --no-memory-check makes it a warning."
    )
    colocate: bool = flag(False, "Training and generation share the same devices.")
    offload: bool | None = flag(None, "With --colocate: engines give memory back while training runs (default there).")
    rollout_engine: Literal["auto", "sglang", "embedded"] = flag(
        "auto", "auto: SGLang where CUDA is, the embedded engine elsewhere."
    )
    rollout_external_engines: tuple[str, ...] = flag(
        (),
        "Engines that run already, http://HOST:PORT each: none is started, and none is stopped. They serve the model "
        "of --hf-checkpoint.",
        metavar="URL",
        secret="url",
    )
    sglang_router_ip: str | None = flag(
        None, "Address of a router that runs already; no other run's engines may stand behind it."
    )
    sglang_router_port: int | None = flag(None, "Its port.", ge=1, le=65535)
    sglang_server_concurrency: int = flag(
        512, "Requests that one engine is sent at once; the others wait in slime.", ge=1, le=1048576
    )
    engine_start_timeout: float = flag(
        600.0, "Seconds within which an engine or the router has to be ready.", gt=0, le=1e8
    )
    engine_request_timeout: float = flag(
        1800.0,
        "Seconds without progress of any engine, after which a generation request is given up; a response may take as "
        "long as it likes while tokens are made. An engine that makes none for so long, with requests, is restarted.",
        gt=0,
        le=1e8,
    )
    train_timeout: float = flag(3600.0, "Seconds within which a collective of training has to end.", gt=0, le=1e8)
    engine_health_timeout: float = flag(
        60.0,
        "Seconds without an answer to a health check, after which an engine or the router counts as hung, is ended and "
        "started anew. A step of any length is no hang: the engine's server answers beside it.",
        gt=0,
        le=1e8,
    )
    max_engine_restarts: int = flag(
        10,
        "Times that one engine, or the router, may be restarted within one hour; one more fault of its ends the run.",
        ge=0,
    )
    phase_timeout: float = flag(
        7200.0,
        "Seconds that one phase (a rollout's generation, its training, a save, ...) may take without any progress; "
        "then the run ends, and says which process did not answer.",
        gt=0,
        le=1e8,
    )
    max_restarts: int = flag(
        2,
        "Times that a run is started again from its last complete checkpoint under --save because a trainer, the "
        "rollout manager or a node was lost; counted anew whenever a checkpoint has been made since.",
        ge=0,
    )
    cpu_threads_per_process: int | None = flag(
        None,
        "Threads of each training and engine process on a CPU (default: cores / processes; --deterministic: 1, for "
        "sums are rounded as threads share them).",
        ge=1,
        le=4096,
    )
    update_weight_transport: Literal["auto", "broadcast", "disk"] = flag(
        "auto",
        "How weights reach the engines; auto: broadcast, or device memory with --colocate. disk: by files, for engines "
        "that share a file system and no fast network.",
    )
    update_weight_disk_dir: str | None = flag(
        None,
        "Directory that trainers write and engines read, under one path, for --update-weight-transport disk and for "
        "--check-weight-sync; unset: engine-weights under --save, else under the run's directory.",
        metavar="DIR",
    )
    update_weight_buffer_size: int = flag(
        512 * 1024**2, "Bytes of one bucket (on disk: one file) of weights on its way.", ge=1, le=2**40
    )
    update_weight_pause: Literal["drain", "abort", "in_place", "retract"] = flag(
        "drain",
        "Requests in flight when weights change. drain: they are answered first. abort: they are answered at once, "
        "with what they have. in_place: they wait, and go on over the KV cache of the old weights. retract: they wait, "
        "and are prefilled again by the new ones. An answer that has waited names the later policy version. train.py "
        "has nothing in flight; train_async.py takes drain, which waits until the rollout in flight is whole, or "
        "abort, after which the same responses go on with the new weights.",
    )
    check_weight_sync: bool = flag(
        True,
        "At the first sync of a run, compare the engines' checksum after the sync with the one after loading the "
        "actor's Hugging Face export from disk; on every later sync, compare the policy version.",
    )
    dry_run: bool = flag(False, "Print the resolved plan and stop; starts nothing.")
    config: str | None = flag(None, "YAML file with the same names; the command line wins.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints: which are loaded, and which are saved."""

    hf_checkpoint: str | None = flag(None, "HF directory: tokenizer, config, the engines' first weights.")
    ref_load: str | None = flag(None, "Reference model: a torch_dist checkpoint or an HF directory.")
    load: str | None = flag(
        None,
        "Checkpoint to go on from: the newest complete one in it. Missing or empty: the actor starts from --ref-load.",
    )
    save: str | None = flag(None, "Directory for checkpoints, args.yaml, metrics.jsonl and logs.")
    save_interval: int | None = flag(None, "Save every N rollouts, and always after the last.", ge=1)
    keep_last_checkpoints: int | None = flag(None, "Keep the newest K checkpoints and remove older ones.", ge=1)
    keep_best_checkpoint: str | None = flag(
        None,
        "Metric of evaluation, eval/NAME/reward or eval/NAME/pass@K: of the checkpoints whose weights were evaluated, "
        "the one with the largest value is never removed, and best_checkpoint.json names it.",
        metavar="METRIC",
    )
    save_hf: str | None = flag(
        None, "Also export an HF directory at each save; {rollout_id} is filled in.", metavar="PATH"
    )
    override_hf_config: tuple[str, ...] = flag(
        (), "Architecture flags that may differ from config.json.", metavar="FLAG"
    )


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Prompts, sampling, rewards."""

    prompt_data: str | None = flag(None, "Training prompts: jsonl or parquet; path@[a:b] takes a slice.")
    input_key: str = flag("prompt", "Key of the prompt in a data line.")
    label_key: str | None = flag(None, "Key of the label that the reward compares with; unset: samples have none.")
    metadata_key: str = flag("metadata", "Key of a dict kept as sample.metadata.")
    tool_key: str | None = flag(None, "Key of the list of tools that the chat template is given.")
    apply_chat_template: bool = flag(False, "Prompts are OpenAI messages; render them with the tokenizer's template.")
    rollout_shuffle: bool = flag(False, "Shuffle prompts anew in each epoch, by (--rollout-seed, epoch).")
    rollout_seed: int = flag(42, "Seed of the data order and of sampling.", ge=0)
    rm_type: str | None = flag(None, "deepscaler, dapo, math, f1, gpqa, remote_rm, random; boxed_ prefix.")
    custom_rm_path: str | None = flag(None, "Reward function, async or plain, by dotted path.")
    group_rm: bool = flag(False, "The function of --custom-rm-path is given a whole group at once.")
    rm_url: str | None = flag(
        None,
        "URL of --rm-type remote_rm: POST {prompt, response, label, metadata}, a number back.",
        secret="url",
    )
    rm_num_workers: int = flag(2, "Worker processes that compute rewards, outside of the event loop.", ge=1, le=4096)
    rm_timeout: float = flag(
        10.0,
        "Seconds for one call of the reward function (with --group-rm: for a group); then it counts as failed.",
        gt=0,
        le=1e8,
    )
    rm_concurrency: int = flag(
        256,
        "Rewards that wait for a network at once: of remote_rm, and of an async --custom-rm-path.",
        ge=1,
        le=1048576,
    )
    rm_worker_memory: float = flag(
        4.0,
        "GB by which a reward worker may grow: a larger one is replaced between two calls, and one that grows by twice "
        "as much is ended, which costs the sample whose reward was at work.",
        gt=0,
        le=1e6,
    )
    max_reward_failures: float = flag(
        0.5,
        "Share of a rollout's samples whose reward may fail (each costs its own sample, and is counted); beyond it the "
        "run ends with the reasons. 1: never.",
        ge=0,
        le=1,
    )
    reward_key: str | None = flag(None, "The entry that is trained on where a reward function returns a dict.")
    num_rollout: int | None = flag(None, "Rollouts to run; 0 evaluates and stops.", ge=0)
    num_epoch: int | None = flag(
        None, "Passes over the prompts, rounded up to whole rollouts; instead of --num-rollout.", ge=1
    )
    rollout_batch_size: int = flag(32, "Prompts in one rollout.", ge=1)
    n_samples_per_prompt: int = flag(1, "Responses to each prompt: the group that grpo and others compare.", ge=1)
    rollout_temperature: float = flag(1.0, "Sampling temperature. Log-probs are of logits divided by it.", ge=0)
    rollout_top_p: float = flag(1.0, "Nucleus sampling; below 1 is refused for training rollouts.", gt=0, le=1)
    rollout_top_k: int = flag(-1, "Top-k sampling, -1 or 0: off; else refused for training rollouts.", ge=-1)
    rollout_max_response_len: int = flag(1024, "Tokens of a response at most; then it counts as truncated.", ge=1)
    rollout_max_context_len: int | None = flag(
        None,
        "Tokens of prompt and response together at most; unset: the model's less 2, which SGLang keeps free. Prompts "
        "that leave no room are dropped.",
        ge=1,
    )
    rollout_stop: tuple[str, ...] = flag((), "Texts that end a response.")
    rollout_stop_token_ids: tuple[int, ...] = flag((), "Stop token ids, besides the model's own.")
    rollout_skip_special_tokens: bool = flag(False, "Leave special tokens out of sample.response.")
    num_steps_per_rollout: int | None = flag(
        None,
        "Optimizer steps that a rollout's samples are cut into, equally; unset: by --global-batch-size, else 1.",
        ge=1,
    )
    balance_data: bool = flag(
        False, "Deal samples to data-parallel ranks so that compute, not only the number of samples, is even."
    )
    over_sampling_batch_size: int | None = flag(
        None,
        "Prompts that are sampled at first, so that dropped groups are made up for; unset: --rollout-batch-size.",
        ge=1,
    )
    refill_granularity: Literal["batch", "group"] = flag(
        "batch", "When drops leave too few: sample another over-sampling batch, or only what is missing."
    )
    max_empty_waves: int = flag(10, "Waves of prompts in which nothing was kept before the run ends.", ge=1)
    partial_rollout: bool = flag(
        False,
        "Groups that a rollout leaves unfinished, or does not need, keep their tokens and rewards, and go on in a "
        "later rollout.",
    )
    partial_rollout_max_tokens: int | None = flag(
        None,
        "Tokens after which a sample is set aside, to go on in a later rollout (or in the same one, where all others "
        "do not fill it); belongs to --partial-rollout, and is needed beside --deterministic.",
        ge=1,
    )
    mask_offpolicy_in_partial_rollout: bool = flag(
        False, "Leave tokens that an earlier policy made out of the loss; belongs to --partial-rollout."
    )
    max_staleness: int | None = flag(
        None,
        "Policy versions by which a token may be older than the weights that are trained on it; a group in the data "
        "buffer that would have an older one starts anew from its prompt.",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class HookOptions:
    """Dotted paths to your own functions; `slime.core.plugins.HOOKS` has their signatures."""

    rollout_function_path: str = flag("slime.rollout.collect.generate_rollout", "Makes one rollout's samples.")
    eval_function_path: str | None = flag(None, "Makes one evaluation; unset: the built-in one.")
    data_source_path: str = flag("slime.rollout.data_buffer.DataBuffer", "Class that hands out prompts.")
    custom_generate_function_path: str | None = flag(None, "Generates one sample.")
    dynamic_sampling_filter_path: str | None = flag(None, "Keeps or drops a finished group.")
    buffer_filter_path: str | None = flag(None, "Takes groups from the data buffer.")
    rollout_sample_filter_path: str | None = flag(None, "Marks samples of a full rollout to leave out of the loss.")
    custom_reward_post_process_path: str | None = flag(None, "Turns raw rewards into training rewards.")
    custom_advantage_function_path: str | None = flag(
        None, "Computes advantages, in the place of --advantage-estimator."
    )
    custom_loss_function_path: str | None = flag(None, "The loss of --loss-type custom_loss.")
    custom_convert_samples_to_train_data_path: str | None = flag(
        None, "Makes the training batch of a rollout's samples."
    )
    custom_rollout_log_function_path: str | None = flag(None, "Called with each rollout's samples and metrics.")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation. Unset sampling flags take the rollout's values."""

    eval_interval: int | None = flag(None, "Evaluate every N rollouts, before the first and after the last.", ge=1)
    eval_prompt_data: tuple[str, ...] = flag((), "One path, or NAME PATH pairs.", metavar="NAME PATH")
    eval_config: str | None = flag(None, "YAML with a list `datasets` (name, path, and any eval flag for it alone).")
    eval_input_key: str | None = flag(None, "Key of the prompt; unset: --input-key.")
    eval_label_key: str | None = flag(None, "Key of the label; unset: --label-key.")
    eval_rm_type: str | None = flag(None, "Reward of evaluation; unset: --rm-type.")
    n_samples_per_eval_prompt: int = flag(1, "Responses to each evaluation prompt; above 1, pass@k is reported.", ge=1)
    eval_max_response_len: int | None = flag(None, "Tokens of a response at most.", ge=1)
    eval_temperature: float | None = flag(None, "Sampling temperature; 0: greedy.", ge=0)
    eval_top_p: float | None = flag(None, "Nucleus sampling.", gt=0, le=1)
    eval_top_k: int | None = flag(None, "Top-k sampling, -1 or 0: off.", ge=-1)
    eval_failed_as: Literal["wrong", "excluded"] = flag(
        "wrong",
        "What a response that could not be generated or judged counts as: the lowest reward of its judge, or nothing.",
    )
    skip_eval_before_train: bool = flag(False, "No evaluation before the first rollout.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Training flags that slime adds to Megatron's."""

    use_dynamic_batch_size: bool = flag(
        False,
        "Pack samples into micro-batches of up to --max-tokens-per-gpu tokens; --micro-batch-size is ignored then.",
    )
    max_tokens_per_gpu: int | None = flag(
        None,
        "Token budget of a micro-batch (x --context-parallel-size), padding counted; a longer sample stands alone.",
        ge=1,
    )
    log_probs_chunk_size: int | None = flag(
        None,
        "Response tokens whose logits are made at once: bounds memory where the vocabulary is large; "
        "unset: 8192 on a GPU in bf16, else 1024.",
        ge=1,
    )
    check_for_nan_in_loss_and_grad: bool = flag(
        True, "A loss, log-prob, reward or gradient that is not finite changes no weight (always so here)."
    )
    check_for_spiky_loss: bool = flag(
        False,
        "A step whose gradient norm, or mean of |loss| over tokens, is more than --spiky-loss-factor times the largest "
        "of the last 100 steps changes no weight either.",
    )
    spiky_loss_factor: float = flag(10.0, "How much larger.", gt=1)
    bad_step_action: Literal["stop", "skip"] = flag(
        "stop",
        "A step that is not finite, or leaps: the run stops and names the samples, or goes on without the step (after "
        "10 in a row it stops).",
    )
    hf_trust_remote_code: bool = flag(False, "Let transformers run code that stands in the HF directory.")


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logs and metrics, and where they go. The console and metrics.jsonl (under --save) always."""

    log_dir: str | None = flag(None, "Where metrics.jsonl and process logs go; unset: --save, else outputs/.")
    log_samples_per_rollout: int = flag(
        2, "Whole samples (prompt, response, reward) a rollout in logs/rollout_samples.txt.", ge=0
    )
    logprob_gap_alarm: float | None = flag(
        None, "Warn where mean |train - rollout log-prob| exceeds this; unset: 1e-3 in fp32, 0.1 in bf16.", gt=0
    )
    use_wandb: bool = flag(False, "Log to Weights & Biases, too; WANDB_API_KEY, or WANDB_MODE=offline, says how.")
    wandb_project: str | None = flag(None, "W&B project; unset: slime.")
    wandb_entity: str | None = flag(None, "W&B user or team; unset: your own.")
    wandb_group: str | None = flag(None, "W&B group.")
    wandb_exp_name: str | None = flag(None, "Name of the W&B run; unset: W&B makes one up.")
    use_tensorboard: bool = flag(False, "Log to TensorBoard, too.")
    tensorboard_dir: str | None = flag(None, "Directory of event files, one a run in it; unset: under --log-dir.")


@dataclass(frozen=True, kw_only=True)
class DebugOptions:
    """Halves of the loop on their own."""

    debug_rollout_only: bool = flag(False, "Generate and judge; train nothing.")
    debug_train_only: bool = flag(False, "Train on --load-debug-rollout-data; start no engine.")
    save_debug_rollout_data: str | None = flag(None, "File for each rollout's samples; {rollout_id} is filled in.")
    save_debug_train_data: str | None = flag(None, "Directory for every tensor of each step, for tools/diff_steps.py.")
    load_debug_rollout_data: str | None = flag(None, "Such files, read instead of generating.")
    deterministic: bool = flag(
        False,
        "Reproducible bit for bit on a CPU, whatever the number of engines; they generate about a third slower. On "
        "GPUs, engines and trainer are asked for their own deterministic modes.",
    )
