"""Whether what is planned fits in a GPU, and which changes would make it fit.

Path: `parse` adds `memory_problems` to those of the rules; `plan` prints `comparison` and `recompute_hint`. Invariant:
every number comes from `memory`'s model, also those of a change that is proposed: it is the same model with other args.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from slime.config.args import Args
from slime.config.dry_run.memory import (
    CUDA_CONTEXT,
    EngineMemory,
    engine_memory,
    pack_tokens,
    stage_layers,
    train_memory,
    turns,
)
from slime.config.flags.megatron_options import ArchitectureOptions, ParallelOptions
from slime.config.resolve import counts_gpus, gpu_memory
from slime.config.rules.case import Case
from slime.config.rules.check import parallel_sizes
from slime.config.rules.problem import Problem, flag_name
from slime.config.sharding import optimizer_ranks
from slime.config.virtual_stages import num_chunks

GIB = 2**30
WARN_ABOVE = 0.92
"""Share of a GPU from which a plan is warned about: what the model leaves out (fragments of the allocator's memory,
workspaces of single kernels) is then likely to be missing."""
SGLANG_SHARE = 0.88
"""About the share of a GPU that SGLang takes where --sglang-mem-fraction-static is not given."""
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NO_RECOMPUTE = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
LEAST_SAVED = 0.05
"""Share of a step's time from which less recomputation is worth a hint."""
TOKENS_STEP = 128
"""A smaller --max-tokens-per-gpu is proposed as a multiple of this."""
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
"""Fields that the memory model reads. Where one of them is wrong, there is no plan to check yet."""


@dataclass(frozen=True)
class Moment:
    """Memory that one GPU holds at one time."""

    name: str
    planned: int
    """Bytes."""
    limit: int
    """Bytes that it has to stay within: the GPU's, or SGLang's share of it."""

    @property
    def share(self) -> float:
        return self.planned / self.limit

    def __str__(self) -> str:
        return f"{self.planned / GIB:,.1f} GiB ({100 * self.share:.1f} %)"


def moments(args: Args, size: float) -> list[Moment]:
    """Memory that GPUs of `size` GiB hold, moment by moment; empty where memory is not estimated.

    Training and an engine of SGLang's are counted; an embedded engine is in host memory, external ones are not ours.
    """
    total = int(size * GIB)
    train = train_memory(args, on_cuda=True)
    engine = None if args.rollout_engine == "embedded" or args.rollout_external_engines else engine_memory(args)
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
    """Bytes that SGLang takes for weights and KV: its share of the GPU, whatever the requests need."""
    taken = int((args.sglang.get("mem_fraction_static") or SGLANG_SHARE) * total)
    most = args.sglang.get("max_total_tokens")
    return taken if most is None else min(taken, engine.weights + most * engine.token)


def fullest(found: Sequence[Moment]) -> Moment:
    return max(found, key=lambda moment: moment.share)


# --- what would help ------------------------------------------------------------------------------------------------

Change = dict[str, Any]
Measure = Callable[[Args, float], tuple[str, Change] | None]
"""The flags to type and the changed fields; None: it is in use already, or cannot be."""


def _share_optimizer(args: Args, size: float) -> tuple[str, Change] | None:
    if args.use_distributed_optimizer or args.optimizer != "adam" or optimizer_ranks(args) < 2:
        return None
    return "--use-distributed-optimizer", {"use_distributed_optimizer": True}


def _recompute(args: Args, size: float) -> tuple[str, Change] | None:
    if args.recompute_granularity == "full" and args.recompute_method != "block":
        return None
    return recompute_flags(FULL_RECOMPUTE), FULL_RECOMPUTE


def recompute_flags(change: Change) -> str:
    return " ".join(f"{flag_name(name)} {value}" for name, value in change.items())


def _smaller_packs(args: Args, size: float) -> tuple[str, Change] | None:
    """The most tokens that fit. A response of full length stands alone, so fewer than its own save nothing."""
    shape, most = args.architecture, args.max_tokens_per_gpu
    if shape is None or most is None or not args.use_dynamic_batch_size:
        return None
    fewest = pack_tokens(replace(args, max_tokens_per_gpu=1), shape)
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
    """The next larger size that divides what it has to and fits by itself; else the largest that divides."""
    largest: tuple[str, Change] | None = None
    tensor = 2 * args.tensor_model_parallel_size
    while tensor <= min(args.actor_world_size, 8):
        change: Change = {"tensor_model_parallel_size": tensor, "sequence_parallel": True}
        changed = replace(args, **change)
        if not any(parallel_sizes(Case(args=changed, given=frozenset()))):
            sequence = "" if args.sequence_parallel else " --sequence-parallel"
            largest = f"--tensor-model-parallel-size {tensor}{sequence}", change
            if _fits(changed, size, only="training"):
                break
        tensor *= 2
    return largest


def _offload_optimizer(args: Args, size: float) -> tuple[str, Change] | None:
    if args.optimizer_cpu_offload or args.optimizer != "adam":
        return None
    return "--optimizer-cpu-offload", {"optimizer_cpu_offload": True}


def _take_turns(args: Args, size: float) -> tuple[str, Change] | None:
    return ("--offload", {"offload": True}) if args.colocate and args.offload is False else None


def _other_share(args: Args, size: float) -> tuple[str, Change] | None:
    """SGLang's largest share that leaves the rest of the GPU what it needs, and holds its own weights."""
    if args.rollout_engine == "embedded" or args.rollout_external_engines:
        return None
    for hundredths in range(90, 5, -5):
        change: Change = {"sglang": {**args.sglang, "mem_fraction_static": hundredths / 100}}
        if _fits(replace(args, **change), size, only="generating"):
            return f"--sglang-mem-fraction-static {hundredths / 100:g}", change
    return None


def _larger_engine(args: Args, size: float) -> tuple[str, Change] | None:
    gpus, shape = 2 * args.rollout_num_gpus_per_engine, args.architecture
    if args.rollout_engine == "embedded" or args.rollout_external_engines or shape is None:
        return None
    if gpus > 8 or (args.rollout_num_gpus or 0) % gpus or shape.num_attention_heads % gpus:
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
    _more_tensor_parallel,
    _offload_optimizer,
)
"""From the cheapest to the dearest in time."""


def _fits(args: Args, size: float, *, only: str = "") -> bool:
    """Whether every moment is below the warning; `only`: those of training, or those of the engine."""
    found = moments(args, size)
    if only == "training":
        found = [moment for moment in found if moment.name == "training"] or found
    elif only:
        found = [moment for moment in found if moment.name not in ("training", "weights sent")]
    return all(moment.share < WARN_ABOVE for moment in found)


def remedies(args: Args, size: float) -> list[str]:
    """Changes that make the plan fit, each with the fullest moment after it; together where none does alone."""
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
    """Measures that each make it smaller, until it fits."""
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
    return [verdict if after.share <= 1 else f"{verdict}, which is still too much: take more or larger GPUs"]


def _excess(args: Args, size: float) -> int:
    """Bytes by which all moments together are above the warning."""
    return sum(max(moment.planned - int(WARN_ABOVE * moment.limit), 0) for moment in moments(args, size))


# --- what is said ----------------------------------------------------------------------------------------------------


def memory_problems(args: Args, others: Sequence[Problem]) -> list[Problem]:
    """One error or warning where the plan does not fit, or hardly fits, in a GPU of known size.

    `others`: what is wrong besides. With wrong sizes there is no plan to check.
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
    rule = f"the plan needs more than the GPU has: {needs}" if too_much else f"the plan leaves little of it: {needs}"
    ways = remedies(args, size)
    remedy = f"what would help: {'; '.join(ways)}" if ways else "take more GPUs, or a smaller model"
    if too_much and args.memory_check:
        remedy += "; --no-memory-check starts it all the same"
    yield Problem(
        severity="error" if too_much and args.memory_check else "warning",
        where="--gpu-memory",
        value=f"{size:.1f}" + ("" if args.gpu_memory is not None else " (this machine's)"),
        rule=rule,
        remedy=remedy,
        fields=frozenset(["gpu_memory"]),
    )


def comparison(args: Args, size: float) -> str:
    """One line of the plan with the memory at each moment and the GPU's size."""
    found = ", ".join(f"{moment.name} {moment}" for moment in moments(args, size))
    return f"of a GPU's {size:,.1f} GiB: {found or 'as much as SGLang chooses to take'}"


def recompute_hint(args: Args, size: float) -> str | None:
    """A line with memory and time of less recomputation, where that fits as well; None: there is nothing to say."""
    shape, train = args.architecture, train_memory(args, on_cuda=True)
    if shape is None or train is None or args.recompute_granularity is None:
        return None
    if fullest(moments(args, size)).share >= WARN_ABOVE:
        return None
    for flags, saved, change in _less_recompute(args, max(stage_layers(args, shape))):
        changed = replace(args, **change)
        if _fits(changed, size):
            needed = next(m for m in moments(changed, size) if m.name in ("training", "always"))
            time = "less time" if saved is None else f"about {100 * saved:.0f} % less time"
            return f"hint: {flags} it would need {needed}, which fits, and a training step would take {time}"
    return None


def _less_recompute(args: Args, layers: int) -> Iterable[tuple[str, float | None, Change]]:
    """From no recomputation to nearly as much as now: how to say it, share of the time that it saves, fields.

    A step takes a forward pass, two such for the backward pass, and the part of one that is run again. Of selective
    recompute, which runs core attention alone again, that part depends on the lengths of responses: it is not told.
    """
    if args.recompute_granularity != "full":
        yield "without recomputation", None, NO_RECOMPUTE
        return
    now = min(args.recompute_num_layers or 1, layers) if args.recompute_method == "block" else layers

    def saved(count: int) -> float:
        return (now - count) / (3 * layers + now)

    yield "without recomputation", saved(0), NO_RECOMPUTE
    if num_chunks(args) > 1:
        return  # with virtual stages a number of layers is each virtual stage's
    for count in (count for count in range(1, now) if saved(count) >= LEAST_SAVED):
        change: Change = {**FULL_RECOMPUTE, "recompute_method": "block", "recompute_num_layers": count}
        yield f"with {recompute_flags(change)}", saved(count), change
