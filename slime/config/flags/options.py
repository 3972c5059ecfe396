"""slime's own flags: one frozen dataclass per section, one field with its help per flag.

- Used by: `parse` fills these classes from argv and YAML, `resolve` and `rules` complete and check them, and all other
  code reads the one frozen `Args` (`config.args`) that they form.
- Invariant: no default is written anywhere else. `None` means "not given"; `resolve` replaces it when another value
  decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.engine_kinds import AUTO, ENGINE_KINDS
from slime.config.experiment_trackers import TRACKERS
from slime.config.flags.flag import Needs, flag
from slime.config.weight_transports import AUTO as AUTO_TRANSPORT
from slime.config.weight_transports import reaching
from slime.core.pausing import PauseChoice


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Placement of training and engines."""

    actor_num_nodes: int = flag(1, "Number of nodes for training.", ge=1, le=65536)
    actor_num_gpus_per_node: int = flag(1, "Training GPUs per node (CPU: training processes).", ge=1, le=1024)
    rollout_num_gpus: int | None = flag(
        None,
        "GPUs for generation (on a CPU: engine processes). 0: no engines, for runs that generate nothing. "
        "--no-rollout-num-gpus takes an earlier number back, for --colocate.",
        ge=0,
        le=1048576,
    )
    rollout_num_gpus_per_engine: int = flag(1, "GPUs per engine: SGLang's tensor-parallel size.", ge=1, le=65536)
    num_gpus_per_node: int = flag(8, "Accepted without effect: Ray knows the GPUs of each node.", ge=1, le=1024)
    gpu_memory: float | None = flag(
        None,
        "Memory of one GPU in GiB, which the planned run must fit in (an H100 has 79.6). Unset: the memory of this "
        "machine's GPUs. With --dry-run, the plan is for GPUs of this size even if the machine has none.",
        ge=0.1,
        le=100_000,
        metavar="GIB",
    )
    memory_check: bool = flag(
        True, "A plan that needs more memory than a GPU has stops the run; --no-memory-check only warns."
    )
    colocate: bool | None = flag(
        None,
        "Colocation: training and generation share the same devices. Unset, and without --rollout-num-gpus: yes, if "
        "this machine has one GPU or none.",
    )
    offload: bool | None = flag(
        None,
        "With --colocate: engines release memory while training runs. Unset: yes.",
        needs=Needs(("colocate",), when_on=True),
    )
    rollout_engine: str = flag(
        AUTO,
        "auto: SGLang on machines with CUDA, the embedded engine on all others.",
        choices=tuple(ENGINE_KINDS),
    )
    rollout_external_engines: tuple[str, ...] = flag(
        (),
        "Engines that already run, each as http://HOST:PORT. They must serve the model of --hf-checkpoint. The run "
        "starts no engine and stops none.",
        metavar="URL",
        secret="url",
    )
    sglang_router_ip: str | None = flag(
        None, "Address of a router that already runs. No other run may have engines behind it."
    )
    sglang_router_port: int | None = flag(None, "Port of the router at --sglang-router-ip.", ge=1, le=65535)
    sglang_server_concurrency: int = flag(
        512, "In-flight requests per engine; further requests wait in slime.", ge=1, le=1048576
    )
    engine_start_timeout: float = flag(
        600.0, "Seconds until an engine or the router must be ready after its start.", gt=0, le=1e8
    )
    engine_request_timeout: float = flag(
        1800.0,
        "Seconds without progress on any engine after which a generation request is given up. A response may take any "
        "time as long as tokens are generated. An engine that has requests but generates no token for this long is "
        "restarted.",
        gt=0,
        le=1e8,
    )
    train_timeout: float = flag(3600.0, "Seconds that one collective of training may take.", gt=0, le=1e8)
    engine_health_timeout: float = flag(
        60.0,
        "Seconds without an answer to a health check after which an engine or the router counts as hung and is "
        "restarted. A long decoding step does not count as a hang: the engine's server answers during the step.",
        gt=0,
        le=1e8,
    )
    max_engine_restarts: int = flag(
        10,
        "How often one engine, or the router, may be restarted within one hour. Its next fault ends the run.",
        ge=0,
    )
    phase_timeout: float = flag(
        7200.0,
        "Seconds that one phase (generation of a rollout, its training, a save, ...) may take without any progress. "
        "After that the run ends and names the process that did not answer.",
        gt=0,
        le=1e8,
    )
    max_restarts: int = flag(
        2,
        "How often the run is started again from its last complete checkpoint under --save after a trainer, the "
        "rollout manager or a node was lost. Each new checkpoint sets the count back to 0.",
        ge=0,
    )
    cpu_threads_per_process: int | None = flag(
        None,
        "Threads of each training and engine process on a CPU. Unset: cores / processes; with --deterministic 1, "
        "because the rounding of sums depends on the number of threads.",
        ge=1,
        le=4096,
    )
    update_weight_transport: str = flag(
        AUTO_TRANSPORT,
        "How the weight sync reaches the engines. auto: broadcast, or device memory with --colocate. disk: files, for "
        "engines that share a file system but no fast network.",
        choices=(AUTO_TRANSPORT, *reaching(shared_devices=False)),
    )
    update_weight_disk_dir: str | None = flag(
        None,
        "Directory that trainers write and engines read under the same path, for --update-weight-transport disk and "
        "for --check-weight-sync. Unset: engine-weights in the run's directory.",
        metavar="DIR",
    )
    update_weight_buffer_size: int = flag(
        2 * 1024**3,
        "Bytes of one bucket of the weight sync (on disk: of one file). A trainer holds two buckets at a time, and an "
        "SGLang outside of --sglang-mem-fraction-static up to two. Larger ones are faster, because an engine needs "
        "some milliseconds for each.",
        ge=1,
        le=2**40,
    )
    update_weight_pause: PauseChoice = flag(
        "drain",
        "What happens to in-flight requests when weights change. drain: they finish first. abort: they return at once "
        "with the tokens they have. in_place: they wait, then continue on the KV cache of the old weights. retract: "
        "they wait, then are prefilled again with the new weights. A response that waited reports the later policy "
        "version. train.py has no request in flight at that time. train_async.py accepts drain, which waits until "
        "the current rollout is complete, and abort, after which the same responses continue with the new weights.",
    )
    check_weight_sync: bool = flag(
        True,
        "At the first weight sync of a run, compare the engines' checksum after the sync with their checksum after "
        "they load the actor's Hugging Face export from disk. At every later sync, compare the policy version.",
    )
    dry_run: bool = flag(False, "Print the resolved plan and stop without starting anything.")
    config: str | None = flag(None, "YAML file of flags. The command line overrides it.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Loading and saving of checkpoints."""

    hf_checkpoint: str | None = flag(None, "HF directory: tokenizer, config.json and the engines' first weights.")
    ref_load: str | None = flag(
        None,
        "Reference model, from which the actor starts, too: a torch_dist checkpoint or an HF directory. Unset: "
        "--hf-checkpoint.",
    )
    load: str | None = flag(
        None,
        "Directory of checkpoints; the run continues from its newest complete one. If it is missing or empty, the "
        "actor starts from --ref-load.",
    )
    save: str | None = flag(
        None,
        "Directory for checkpoints, args.yaml, metrics.jsonl and logs. Unset: a new directory for each run, "
        "outputs/NAME with --run-name, otherwise outputs/ and the time.",
    )
    run_name: str | None = flag(
        None,
        "Name of the run: of its directory under outputs/ without --save, and in W&B. If outputs/NAME exists, the "
        "directory is NAME-2.",
        metavar="NAME",
    )
    save_interval: int | None = flag(
        None, "Save every N rollouts, and always after the last one. 0: never save a checkpoint.", ge=0
    )
    save_interval_minutes: float | None = flag(
        None,
        "Save after the first rollout that ends this long after the last save, and after the last rollout. Saves that "
        "take longer than 3 % of the time happen less often. Unset: 10 without --save and --save-interval, otherwise "
        "never.",
        gt=0,
        le=1e6,
        metavar="MIN",
    )
    keep_last_checkpoints: int | None = flag(
        None, "Keep the newest K checkpoints and remove older ones. Unset: 2 without --save, otherwise all.", ge=1
    )
    keep_best_checkpoint: str | None = flag(
        None,
        "An evaluation metric, eval/NAME/reward or eval/NAME/pass@K. Among the checkpoints whose weights were "
        "evaluated, the one with the largest value is never removed, and best_checkpoint.json names it. SFT has "
        "eval/NAME/loss, of which the smallest is best.",
        metavar="METRIC",
    )
    save_hf: str | None = flag(
        None, "Export an HF directory to this path at each save; {rollout_id} is filled in.", metavar="PATH"
    )
    override_hf_config: tuple[str, ...] = flag(
        (), "Names of architecture flags that may differ from config.json.", metavar="FLAG"
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Training flags that slime adds to Megatron's."""

    use_dynamic_batch_size: bool = flag(
        False, "Pack micro-batches of up to --max-tokens-per-gpu tokens and ignore --micro-batch-size."
    )
    max_tokens_per_gpu: int | None = flag(
        None,
        "Token budget of a micro-batch per context-parallel rank, including padding. A sample that exceeds it gets a "
        "micro-batch of its own.",
        ge=1,
        needs=Needs(
            ("use_dynamic_batch_size",),
            why="micro-batches are filled by tokens only with --use-dynamic-batch-size",
            remedy="add --use-dynamic-batch-size",
        ),
    )
    log_probs_chunk_size: int | None = flag(
        None,
        "Response tokens whose logits are computed at once, which bounds memory for large vocabularies. Unset: 8192 on "
        "a GPU in bf16, otherwise 1024.",
        ge=1,
    )
    check_for_nan_in_loss_and_grad: bool = flag(
        True, "A step whose loss, log-prob, reward or gradient is not finite changes no weight (always so here)."
    )
    check_for_spiky_loss: bool = flag(
        False,
        "A step changes no weight if its gradient norm, or its mean of |loss| over tokens, is more than "
        "--spiky-loss-factor times the largest of the last 100 steps.",
    )
    spiky_loss_factor: float = flag(
        10.0,
        "The factor of --check-for-spiky-loss, above which a step is a spike.",
        gt=1,
        needs=Needs(("check_for_spiky_loss",), remedy="add it"),
    )
    bad_step_action: Literal["stop", "skip"] = flag(
        "stop",
        "What happens after a step that is not finite or is a spike. stop: the run stops and names the samples. skip: "
        "it continues without the step, and stops after 10 such steps in a row.",
    )
    hf_trust_remote_code: bool = flag(False, "Let transformers run code from the HF directory.")


_WANDB = Needs(("use_wandb",), remedy="add --use-wandb")
_TRACKER_SWITCHES = ", ".join(f"--{row.switch.replace('_', '-')}" for row in TRACKERS.values() if row.switch)


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logs and metrics, in addition to the console and metrics.jsonl, which every run has."""

    log_dir: str | None = flag(
        None, "Directory of metrics.jsonl and the processes' logs. Unset: --save, or the run's own directory."
    )
    log_samples_per_rollout: int = flag(
        32,
        "Samples of each rollout that are written to samples.jsonl, in whole groups; every answer of an evaluation is "
        "written as well.",
        ge=0,
    )
    logprob_gap_alarm: float | None = flag(
        None, "Warn when mean |train - rollout log-prob| exceeds this. Unset: 1e-3 in fp32, 0.1 in bf16.", gt=0
    )
    trackers: tuple[str, ...] = flag(
        (),
        f"Trackers that get every number of metrics.jsonl, too. {_TRACKER_SWITCHES} do the same for one each.",
        choices=tuple(TRACKERS),
    )
    use_wandb: bool = flag(False, "Log to Weights & Biases as well. Set WANDB_API_KEY, or WANDB_MODE=offline.")
    wandb_project: str | None = flag(None, "W&B project; unset: slime.", needs=_WANDB)
    wandb_entity: str | None = flag(None, "W&B user or team; unset: your own.", needs=_WANDB)
    wandb_group: str | None = flag(None, "W&B group.", needs=_WANDB)
    wandb_exp_name: str | None = flag(
        None, "Name of the W&B run; unset: --run-name, or one that W&B chooses.", needs=_WANDB
    )
    use_tensorboard: bool = flag(False, "Log to TensorBoard as well.")
    tensorboard_dir: str | None = flag(
        None,
        "Directory with one subdirectory per run. Unset: under --log-dir.",
        needs=Needs(("use_tensorboard",), remedy="add it"),
    )


@dataclass(frozen=True, kw_only=True)
class DebugOptions:
    """Runs of one half of the loop, and dumps."""

    debug_rollout_only: bool = flag(False, "Generate and judge, but train nothing.")
    debug_train_only: bool = flag(False, "Train on --load-debug-rollout-data and start no engine.")
    save_debug_rollout_data: str | None = flag(None, "File for the samples of each rollout; {rollout_id} is filled in.")
    save_debug_train_data: str | None = flag(None, "Directory for all tensors of each step, for tools/diff_steps.py.")
    load_debug_rollout_data: str | None = flag(None, "Files of --save-debug-rollout-data, read instead of generating.")
    deterministic: bool = flag(
        False,
        "Make a run on a CPU reproducible bit for bit, whatever the number of engines; generation is about a third "
        "slower. On GPUs, engines and trainer use their own deterministic modes.",
    )
