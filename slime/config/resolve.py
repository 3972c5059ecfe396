"""The resolution of open values: every `None` that another flag or this machine decides.

- Used by: `parse`, before `rules`; other code uses the predicates on this machine and the Args.
- Invariant: resolving twice changes nothing, and a given value changes only if a rule reports it in a warning or error.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from functools import cache
from typing import Any, cast

from slime.config.args import REWARD_SUM, SFT_ROLLOUT, Args
from slime.config.data_defaults import data_defaults
from slime.config.engine_kinds import AUTO, ENGINE_KINDS, ON_CPU, ON_GPUS
from slime.config.experiment_trackers import TRACKERS
from slime.config.memory import COLOCATED_MEM_FRACTION
from slime.config.weight_transports import AUTO as AUTO_TRANSPORT
from slime.config.weight_transports import reaching

SAVE_INTERVAL_MINUTES = 10.0
KEEP_LAST = 2
"""When a run without --save saves, and how many checkpoints it keeps."""
OUTPUTS = "outputs"
"""The folder, in the current one, with the directories of runs without --save."""


@cache
def cuda_available() -> bool:
    """Return whether torch finds a CUDA device on this machine.

    torch is imported only if NVIDIA's driver can be loaded, because without the driver it finds no device. This saves
    1.5 seconds at every start on a machine without GPUs.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


def cuda_devices() -> int:
    """Return the number of CUDA devices that this process sees."""
    if not cuda_available():
        return 0
    import torch

    return torch.cuda.device_count()


@cache
def cuda_memory() -> float | None:
    """Return the memory in GiB of the smallest CUDA device that this process sees; None: there is none."""
    count = cuda_devices()
    if not count:
        return None
    import torch

    properties = [cast(Any, torch.cuda).get_device_properties(index) for index in range(count)]
    return min(int(each.total_memory) for each in properties) / 2**30


def gpu_memory(args: Args) -> float | None:
    """Return the GiB of a GPU that the run must fit in: --gpu-memory, or this machine's GPUs; None: unknown."""
    return cuda_memory() if args.gpu_memory is None else args.gpu_memory


def joins_ray() -> bool:
    """Return whether the run joins a Ray cluster, which may have GPUs even if this machine has none."""
    return bool(os.environ.get("RAY_ADDRESS"))


def plans_gpus(args: Args) -> bool:
    """Return whether a --dry-run plans for GPUs of the size --gpu-memory, even if this machine has none."""
    return args.dry_run and args.gpu_memory is not None


def for_gpus(args: Args) -> bool:
    """Return whether training runs on GPUs or is planned for them, as far as this machine and the flags show."""
    return cuda_available() or plans_gpus(args) or args.engine.on_gpus


def counts_gpus(args: Args) -> bool:
    """Return whether a plan counts GPU memory; unlike `for_gpus`, also if only Ray's cluster may have GPUs."""
    return for_gpus(args) or args.rollout_engine == AUTO


def resolve(args: Args) -> Args:
    """Return Args with open values filled in. Contradicting flags stay as they are; the rules report them."""
    args = replace(args, **_run(args), **data_defaults(args))
    changes: dict[str, Any] = {**_placement(args), **_batches(args), **_evaluation(args)}
    if args.bf16 is None:
        changes["bf16"] = cuda_available() or plans_gpus(args)
    if args.logprob_gap_alarm is None:
        changes["logprob_gap_alarm"] = 0.1 if changes.get("bf16", args.bf16) else 1e-3
    if args.log_probs_chunk_size is None:
        changes["log_probs_chunk_size"] = 8192 if for_gpus(args) and changes.get("bf16", args.bf16) else 1024
    if args.eps_clip_high is None:
        changes["eps_clip_high"] = args.resolved.eps_clip_high
    if args.reward_key is None and len(args.reward_paths) > 1:
        changes["reward_key"] = REWARD_SUM
    if args.critic_lr is None:
        changes["critic_lr"] = args.lr
    for name in args.tracker_names:
        switch = TRACKERS[name].switch
        if switch is not None:
            changes[switch] = True
    if changes.get("use_wandb") and args.wandb_project is None:
        changes["wandb_project"] = "slime"
    if changes.get("use_wandb") and args.wandb_exp_name is None:
        changes["wandb_exp_name"] = args.run_name
    args = replace(args, **changes)
    return args if args.needs_directory else in_directory(args, "")


def _run(args: Args) -> dict[str, Any]:
    """Return defaults that the algorithm, the prompts and --save decide: the run's length, its groups, its saves."""
    changes: dict[str, Any] = {"n_samples_per_prompt": args.resolved.n_samples_per_prompt}
    if args.ref_load is None and not args.distills:  # a teacher is another model, which has to be named
        changes["ref_load"] = args.hf_checkpoint
    countable = args.prompt_data is not None and not args.has_own_data_source and args.load_debug_rollout_data is None
    if args.num_rollout is None and args.num_epoch is None and countable:
        changes["num_epoch"] = 1
    if args.save is None and args.saves:
        if args.save_interval is None and args.save_interval_minutes is None:
            changes["save_interval_minutes"] = SAVE_INTERVAL_MINUTES
        if args.keep_last_checkpoints is None:
            changes["keep_last_checkpoints"] = KEEP_LAST
    return changes


def in_directory(args: Args, directory: str) -> Args:
    """Return resolved Args with the paths of all that the run writes; `directory` is its own, if it needs one."""
    save = args.save or (directory if args.saves else None) or None
    log_dir = args.log_dir or save or directory
    args = replace(args, save=save, log_dir=log_dir)
    if args.update_weight_disk_dir is None:
        args = replace(args, update_weight_disk_dir=f"{save or log_dir}/engine-weights")
    if args.use_tensorboard and args.tensorboard_dir is None:
        args = replace(args, tensorboard_dir=f"{log_dir}/tensorboard")
    return args


def _placement(args: Args) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    on_gpus = cuda_available() or plans_gpus(args)
    kind = args.rollout_engine
    if kind == AUTO and (on_gpus or not joins_ray()):
        changes["rollout_engine"] = kind = ON_GPUS if on_gpus else ON_CPU
    num_gpus = args.rollout_num_gpus
    if args.debug_train_only:
        num_gpus = 0
    elif num_gpus is None and args.rollout_external_engines:
        num_gpus = len(args.rollout_external_engines) * args.rollout_num_gpus_per_engine
    elif num_gpus is None and args.colocate is None and not _generates(args):
        num_gpus = 0
    elif num_gpus is None and args.colocate is None and not args.rollouts_ahead:
        args = replace(args, colocate=cuda_devices() <= 1)
    if num_gpus is None and args.colocate:
        num_gpus = args.actor_world_size
    changes["rollout_num_gpus"] = num_gpus
    changes["colocate"] = bool(args.colocate)
    if args.offload is None:
        changes["offload"] = bool(args.colocate)
    shared = bool(args.colocate) and (changes.get("offload", args.offload) is True)
    if shared and ENGINE_KINDS[kind].reads("mem_fraction_static"):
        changes["sglang"] = {"mem_fraction_static": COLOCATED_MEM_FRACTION, **args.sglang}
    if args.update_weight_transport == AUTO_TRANSPORT and not args.colocate:
        changes["update_weight_transport"] = next(iter(reaching(shared_devices=False)))
    if args.cpu_threads_per_process is None:
        engines = 0 if args.rollout_external_engines else (num_gpus or 0) // args.rollout_num_gpus_per_engine
        processes = args.actor_world_size + engines
        # The rounding of a sum depends on the number of threads that compute it.
        changes["cpu_threads_per_process"] = 1 if args.deterministic else max(1, _cores() // processes)
    return changes


def _generates(args: Args) -> bool:
    """Return whether the run may ask engines for responses, in training or in evaluation."""
    given = args.rollout_function_path == SFT_ROLLOUT or args.load_debug_rollout_data is not None
    return not given or (bool(args.eval_prompt_data or args.eval_config) and not args.validates)


def _batches(args: Args) -> dict[str, Any]:
    """Compute steps per rollout and samples per step from each other; one step if neither is given."""
    changes: dict[str, Any] = {}
    if args.over_sampling_batch_size is None:
        changes["over_sampling_batch_size"] = args.rollout_batch_size
    samples = args.rollout_batch_size * args.resolved.n_samples_per_prompt
    steps, batch = args.num_steps_per_rollout, args.global_batch_size
    if steps is None:
        steps = 1 if batch is None else samples // batch
    if batch is None:
        batch = samples // steps
    return changes | {"num_steps_per_rollout": steps, "global_batch_size": batch}


def _evaluation(args: Args) -> dict[str, Any]:
    """Return the rollout's values for unset eval flags; --n-samples-per-eval-prompt has its own default."""
    inherited: dict[str, tuple[Any, Any]] = {
        "eval_input_key": (args.eval_input_key, args.input_key),
        "eval_label_key": (args.eval_label_key, args.label_key),
        "eval_rm_type": (args.eval_rm_type, args.rm_type),
        "eval_max_response_len": (args.eval_max_response_len, args.rollout_max_response_len),
        "eval_temperature": (args.eval_temperature, args.rollout_temperature),
        "eval_top_p": (args.eval_top_p, args.rollout_top_p),
        "eval_top_k": (args.eval_top_k, args.rollout_top_k),
    }
    return {name: rollout for name, (given, rollout) in inherited.items() if given is None}


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
