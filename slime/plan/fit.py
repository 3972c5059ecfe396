"""The check of whether a plan fits in a GPU's memory, and the changes that would make it fit.

- Used by: train.py and train_async.py load their arguments through `load_run`; `summary` prints `comparison` and
  `recompute_hint`.
- Invariant: every number comes from `memory_model`'s model, also the numbers of a proposed change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from slime.config.args import Args
from slime.config.flags.megatron_options import ArchitectureOptions, ParallelOptions
from slime.config.parse import load_args, parallel_problems
from slime.config.pipeline_stages import num_chunks, stage_layers
from slime.config.problem import Problem, flag_name
from slime.config.resolve import counts_gpus, gpu_memory
from slime.config.sharding import optimizer_ranks
from slime.plan.memory_model import (
    CUDA_CONTEXT,
    EngineMemory,
    engine_memory,
    pack_tokens,
    train_memory,
    turns,
)

GIB = 2**30
WARN_ABOVE = 0.92
"""The fraction of a GPU above which there is a warning. The rest is for memory that the model does not count: fragments
of the allocator and workspaces of single kernels."""
SGLANG_SHARE = 0.88
"""The approximate fraction of a GPU that SGLang takes without --sglang-mem-fraction-static."""
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NO_RECOMPUTE = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
LEAST_SAVED = 0.05
"""The fraction of a step's time that less recomputation must save to be worth a hint."""
TOKENS_STEP = 128
"""The number of which a proposed --max-tokens-per-gpu is a multiple."""
_READ = frozenset(
    [
        *(item.name for section in (ArchitectureOptions, ParallelOptions) for item in fields(section)),
        *("actor_num_nodes", "actor_num_gpus_per_node", "colocate", "offload"),
        *("rollout_num_gpus", "rollout_num_gpus_per_engine", "rollout_engine", "rollout_external_engines"),
        *("rollout_batch_size", "n_samples_per_prompt", "over_sampling_batch_size", "num_steps_per_rollout"),
        *("rollout_max_response_len", "rollout_max_context_len", "sglang_server_concurrency"),
        *("use_dynamic_batch_size", "max_tokens_per_gpu", "log_probs_chunk_size", "update_weight_buffer_size"),
        *("optimizer", "use_distributed_optimizer", "optimizer_cpu_offload", "bf16", "gpu_memory"),
    ]
)
"""The fields that the memory model reads. If one of them is wrong, there is no plan to check yet."""


@dataclass(frozen=True)
class Moment:
    """The memory that one GPU holds at one time."""

    name: str
    planned: int
    """The planned bytes."""
    limit: int
    """The bytes that it must not exceed: those of the GPU, or of SGLang's share of it."""

    @property
    def share(self) -> float:
        """Return the planned fraction of the limit."""
        return self.planned / self.limit

    def __str__(self) -> str:
        return f"{self.planned / GIB:,.1f} GiB ({100 * self.share:.1f} %)"


def moments(args: Args, size: float) -> list[Moment]:
    """Return the memory that GPUs of `size` GiB hold at each moment; empty if memory is not estimated.

    Training and SGLang engines are counted. An embedded engine is in host memory, and external engines are not ours.
    """
    total = int(size * GIB)
    train = train_memory(args, on_cuda=True)
    engine = engine_memory(args) if args.engines_may_use_gpus else None
    if engine is None:
        return [] if train is None else [Moment("training", train.peak + CUDA_CONTEXT, total)]
    taken = _taken(args, engine, total)
    room = Moment("the engine's weights and one request, of SGLang's share,", engine.least, max(taken, 1))
    found = [room] if room.share > 1 else []
    if train is not None and args.colocate:
        shared = turns(args, train, replace(engine, kv=taken - engine.weights))
        return [*(Moment(name, planned, total) for name, planned in shared.items()), *found]
    if "mem_fraction_static" in args.sglang:  # else SGLang chooses a share that fits
        found.insert(0, Moment("the engine", taken + CUDA_CONTEXT, total))
    return found if train is None else [Moment("training", train.peak + CUDA_CONTEXT, total), *found]


def _taken(args: Args, engine: EngineMemory, total: int) -> int:
    """Return the bytes that SGLang takes for weights and KV cache: its share of the GPU, whatever requests need."""
    taken = int((args.sglang.get("mem_fraction_static") or SGLANG_SHARE) * total)
    most = args.sglang.get("max_total_tokens")
    return taken if most is None else min(taken, engine.weights + most * engine.token)


def fullest(found: Sequence[Moment]) -> Moment:
    """Return the moment with the largest share of its limit."""
    return max(found, key=lambda moment: moment.share)


# --- what would help ------------------------------------------------------------------------------------------------

Change = dict[str, Any]
Measure = Callable[[Args, float], tuple[str, Change] | None]
"""A function that returns the flags to give and the changed fields, or None if it is already used or impossible."""


def _share_optimizer(args: Args, size: float) -> tuple[str, Change] | None:
    if args.use_distributed_optimizer or args.optimizer != "adam" or optimizer_ranks(args) < 2:
        return None
    return "--use-distributed-optimizer", {"use_distributed_optimizer": True}


def _recompute(args: Args, size: float) -> tuple[str, Change] | None:
    if args.recompute_granularity == "full" and args.recompute_method != "block":
        return None
    return recompute_flags(FULL_RECOMPUTE), FULL_RECOMPUTE


def recompute_flags(change: Change) -> str:
    """Return the changed fields as flags on a command line."""
    return " ".join(f"{flag_name(name)} {value}" for name, value in change.items())


def _smaller_packs(args: Args, size: float) -> tuple[str, Change] | None:
    """Propose the largest number of tokens that fits.

    A response of full length gets a pack of its own, so a budget below its length saves nothing.
    """
    arch, most = args.architecture, args.max_tokens_per_gpu
    if arch is None or most is None or not args.use_dynamic_batch_size:
        return None
    fewest = pack_tokens(replace(args, max_tokens_per_gpu=1), arch)
    low, high = -(-fewest // TOKENS_STEP), (most - 1) // TOKENS_STEP

    def change(steps: int) -> Change:
        return {"max_tokens_per_gpu": steps * TOKENS_STEP}

    if low > high or low < 1 or not _fits(replace(args, **change(low)), size, only="training"):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(replace(args, **change(middle)), size, only="training"):
            low = middle
        else:
            high = middle - 1
    return f"--max-tokens-per-gpu {low * TOKENS_STEP}", change(low)


def _fewer_logits(args: Args, size: float) -> tuple[str, Change] | None:
    if args.log_probs_chunk_size is None or args.log_probs_chunk_size <= 1024:
        return None
    return "--log-probs-chunk-size 1024", {"log_probs_chunk_size": 1024}


def _more_tensor_parallel(args: Args, size: float) -> tuple[str, Change] | None:
    """Propose the smallest larger size that is possible and fits, or else the largest possible one."""
    largest: tuple[str, Change] | None = None
    tensor = 2 * args.tensor_model_parallel_size
    while tensor <= min(args.actor_world_size, 8):
        change: Change = {"tensor_model_parallel_size": tensor, "sequence_parallel": True}
        changed = replace(args, **change)
        if not parallel_problems(changed):
            sequence = "" if args.sequence_parallel else " --sequence-parallel"
            largest = f"--tensor-model-parallel-size {tensor}{sequence}", change
            if _fits(changed, size, only="training"):
                break
        tensor *= 2
    return largest


def _more_expert_parallel(args: Args, size: float) -> tuple[str, Change] | None:
    """Propose the smallest larger size that is possible and fits, or else the largest possible one."""
    largest: tuple[str, Change] | None = None
    most = min(args.actor_world_size, args.num_experts or 0)
    for ranks in range(args.expert_model_parallel_size + 1, most + 1):
        change: Change = {"expert_model_parallel_size": ranks}
        changed = replace(args, **change)
        if not parallel_problems(changed):
            largest = f"--expert-model-parallel-size {ranks}", change
            if _fits(changed, size, only="training"):
                break
    return largest


def _offload_optimizer(args: Args, size: float) -> tuple[str, Change] | None:
    if args.optimizer_cpu_offload or args.optimizer != "adam":
        return None
    return "--optimizer-cpu-offload", {"optimizer_cpu_offload": True}


def _take_turns(args: Args, size: float) -> tuple[str, Change] | None:
    return ("--offload", {"offload": True}) if args.colocate and args.offload is False else None


def _other_share(args: Args, size: float) -> tuple[str, Change] | None:
    """Propose the largest share for SGLang that leaves enough for the rest and holds SGLang's own weights."""
    if not args.engines_may_use_gpus:
        return None
    for hundredths in range(90, 5, -5):
        change: Change = {"sglang": {**args.sglang, "mem_fraction_static": hundredths / 100}}
        if _fits(replace(args, **change), size, only="generating"):
            return f"--sglang-mem-fraction-static {hundredths / 100:g}", change
    return None


def _larger_engine(args: Args, size: float) -> tuple[str, Change] | None:
    gpus, arch = 2 * args.rollout_num_gpus_per_engine, args.architecture
    if not args.engines_may_use_gpus or arch is None:
        return None
    if gpus > 8 or (args.rollout_num_gpus or 0) % gpus or arch.num_attention_heads % gpus:
        return None
    return f"--rollout-num-gpus-per-engine {gpus}", {"rollout_num_gpus_per_engine": gpus}


MEASURES: tuple[Measure, ...] = (
    _share_optimizer,
    _take_turns,
    _recompute,
    _fewer_logits,
    _smaller_packs,
    _other_share,
    _larger_engine,
    _more_expert_parallel,
    _more_tensor_parallel,
    _offload_optimizer,
)
"""The measures, from the one that costs least time to the one that costs most."""


def _fits(args: Args, size: float, *, only: str = "") -> bool:
    """Return whether every moment is below the warning; `only`: consider only training, or only the engine."""
    found = moments(args, size)
    if only == "training":
        found = [moment for moment in found if moment.name == "training"] or found
    elif only:
        found = [moment for moment in found if moment.name not in ("training", "weights sent")]
    return all(moment.share < WARN_ABOVE for moment in found)


def remedies(args: Args, size: float) -> list[str]:
    """Return changes that make the plan fit, each with the fullest moment after it.

    If no single change is enough, return a combination of changes.
    """
    limit = 1.0 if fullest(moments(args, size)).share > 1 else WARN_ABOVE
    found: list[str] = []
    for measure in MEASURES:
        proposal = measure(args, size)
        if proposal is None:
            continue
        after = fullest(moments(replace(args, **proposal[1]), size))
        if after.share < limit:
            found.append(f"{proposal[0]}: {after}")
    return found or _together(args, size)


def _together(args: Args, size: float) -> list[str]:
    """Return measures that together reduce memory, with the fullest moment after them."""
    changed, used = args, list[str]()
    for measure in MEASURES:
        proposal = measure(changed, size)
        if proposal is None:
            continue
        better = replace(changed, **proposal[1])
        if _excess(better, size) < _excess(changed, size):
            changed = better
            used.append(proposal[0])
    after = fullest(moments(changed, size))
    if not used:
        return []
    verdict = f"{' '.join(used)} together: {after}"
    return [verdict if after.share <= 1 else f"{verdict}, which is still too much: use more or larger GPUs"]


def _excess(args: Args, size: float) -> int:
    """Return the number of bytes by which all moments together exceed the warning."""
    return sum(max(moment.planned - int(WARN_ABOVE * moment.limit), 0) for moment in moments(args, size))


# --- problems and lines of the plan ----------------------------------------------------------------------------------


def load_run(argv: Sequence[str], *, rollouts_ahead: int = 0) -> tuple[Args, list[Problem]]:
    """Return the Args of a run and the warnings, as `load_args` does, with those about memory.

    Raises:
        UsageError: all errors at once.
    """
    return load_args(argv, rollouts_ahead=rollouts_ahead, more=memory_problems)


def memory_problems(args: Args, others: Sequence[Problem]) -> list[Problem]:
    """Return one error or warning if the plan does not fit, or hardly fits, in a GPU of known size.

    `others`: the problems found so far. If sizes are wrong, there is no plan to check.
    """
    size = gpu_memory(args) if counts_gpus(args) else None
    wrong = {field for problem in others if problem.severity == "error" for field in problem.fields}
    if size is None or wrong & _READ:
        return []
    return list(_problems(args, size))


def _problems(args: Args, size: float) -> Iterable[Problem]:
    found = [moment for moment in moments(args, size) if moment.share >= WARN_ABOVE]
    if not found:
        return
    too_much = any(moment.share > 1 for moment in found)
    needs = ", ".join(f"{moment.name} {moment}" for moment in found)
    rule = f"the plan needs more than the GPU has: {needs}" if too_much else f"the plan leaves little memory: {needs}"
    ways = remedies(args, size)
    remedy = f"what would help: {'; '.join(ways)}" if ways else "use more GPUs, or a smaller model"
    if too_much and args.memory_check:
        remedy += "; --no-memory-check starts it anyway"
    yield Problem(
        severity="error" if too_much and args.memory_check else "warning",
        where="--gpu-memory",
        value=f"{size:.1f}" + ("" if args.gpu_memory is not None else " (this machine's)"),
        rule=rule,
        remedy=remedy,
        fields=frozenset(["gpu_memory"]),
    )


def comparison(args: Args, size: float) -> str:
    """Return a line of the plan with the memory at each moment and the GPU's size."""
    found = ", ".join(f"{moment.name} {moment}" for moment in moments(args, size))
    return f"of a GPU's {size:,.1f} GiB: {found or 'as much as SGLang chooses to take'}"


def recompute_hint(args: Args, size: float) -> str | None:
    """Return a line with memory and time of less recomputation if that also fits, and None otherwise."""
    arch, train = args.architecture, train_memory(args, on_cuda=True)
    if arch is None or train is None or args.recompute_granularity is None:
        return None
    if fullest(moments(args, size)).share >= WARN_ABOVE:
        return None
    for flags, saved, change in _less_recompute(args, max(stage_layers(args, arch))):
        changed = replace(args, **change)
        if _fits(changed, size):
            needed = next(m for m in moments(changed, size) if m.name in ("training", "always"))
            time = "less time" if saved is None else f"about {100 * saved:.0f} % less time"
            return f"hint: {flags} it would need {needed}, which fits, and a training step would take {time}"
    return None


def _less_recompute(args: Args, layers: int) -> Iterable[tuple[str, float | None, Change]]:
    """Yield settings from no recomputation to nearly as much as now: description, saved fraction of time, fields.

    A step takes the time of one forward pass, of two more for the backward pass, and of the recomputed part. With 32
    recomputed layers of 32, no recomputation saves 32 / (3 x 32 + 32) = 25 %. Selective recompute repeats only core
    attention, and its time depends on the lengths of responses, so the saved fraction is None.
    """
    if args.recompute_granularity != "full":
        yield "without recomputation", None, NO_RECOMPUTE
        return
    now = min(args.recompute_num_layers or 1, layers) if args.recompute_method == "block" else layers

    def saved(count: int) -> float:
        return (now - count) / (3 * layers + now)

    yield "without recomputation", saved(0), NO_RECOMPUTE
    if num_chunks(args) > 1:
        return  # with virtual stages, the number of layers applies to each virtual stage
    for count in (count for count in range(1, now) if saved(count) >= LEAST_SAVED):
        change: Change = {**FULL_RECOMPUTE, "recompute_method": "block", "recompute_num_layers": count}
        yield f"with {recompute_flags(change)}", saved(count), change
