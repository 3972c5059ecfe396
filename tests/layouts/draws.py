"""The cases of the layout property: a model, an algorithm, samples, and a way to split the work.

- Used by: `python -m tests.layouts` and the short test call `draw(seed)`; `one_step` runs it split, and in one process.
- Invariant: the seed decides everything. A draw that the rules refuse is drawn again and counted, so a feature is tried
  as soon as it is no longer refused.

Shapes: _N samples, _R response tokens, _T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.args import Args
from slime.config.parse import UsageError, load_args
from slime.core.batch import COLUMNS, TrainBatch
from tests.layouts.models import DENSE, MOE, NUM_EXPERTS, TOPK, VOCAB, Model

Flags = dict[str, Any]
SGD: Flags = {"optimizer": "sgd", "lr": 10.0, "sgd_momentum": 0.0}
ADAM: Flags = {"optimizer": "adam", "lr": 1e4, "adam_eps": 1e3}
"""With so large an epsilon Adam's first step is 10 x gradient, as SGD's; Megatron shards only Adam."""
ONE_BY_ONE: Flags = {"micro_batch_size": 1}
"""The flags of the single process: every sample is a micro-batch of its own, in the given order."""
MOST_TRIES = 2000
_VIRTUAL_LAYERS, _VIRTUAL_STAGES = "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"
PROCESSES = {1: 3, 2: 42, 4: 38, 8: 17}
"""Numbers of ranks, each with its share of a hundred draws."""


@dataclass(frozen=True)
class Draw:
    seed: int
    model: Model
    num_ranks: int
    layout: Flags
    """Flags of the split run only."""
    algorithm: Flags
    """Flags of both runs."""
    data: Flags
    """The options of `samples`."""
    moved: bool
    """Whether the old log-probs differ from the trained policy's; otherwise they are equal."""
    shuffled: bool
    """Whether the split run gets the samples in another order."""

    def args(self, root: Path, *, cut: bool) -> Args:
        """Return the arguments, checked by the parser and all rules of a real run.

        Raises:
            UsageError: the rules refuse it.
        """
        actor, reference = self.model.directories(root)
        replayed = root / "rollout_0.pt"
        replayed.touch()
        flags: Flags = {
            "hf_checkpoint": actor,
            "load": actor,
            "ref_load": reference,
            "debug_train_only": True,
            "load_debug_rollout_data": replayed.with_name("rollout_{rollout_id}.pt"),
            "num_rollout": 1,
            "rollout_batch_size": self.data["groups"],
            "n_samples_per_prompt": self.data["group"],
            "log_dir": root / "logs",
            "cpu_threads_per_process": 1,
            "train_timeout": 600,
            "weight_decay": 0,
            **self.algorithm,
            **(self.layout | {"actor_num_gpus_per_node": self.num_ranks} if cut else ONE_BY_ONE),
        }
        return load_args(argv(flags))[0]

    def dimensions(self) -> dict[str, str]:
        """Return the properties of the draw that the table counts."""
        flags = {**self.layout, **self.algorithm}
        sizes = {name: flags.get(field, 1) for name, field in SIZES.items()}
        rest = self.num_ranks // (sizes["TP"] * sizes["PP"] * sizes["CP"])
        kl = flags.get("kl_loss_type", "k3") if flags.get("use_kl_loss") else "none"
        correction = flags.get("offpolicy_correction", "tis")
        weighted = flags.get("use_tis") or self.data["versions"]
        return {
            "processes": str(self.num_ranks),
            **{name: str(size) for name, size in sizes.items()},
            "DP": str(rest),
            "ETP": str(flags.get("expert_tensor_parallel_size") or "TP") if self.model.has_experts else "dense",
            "VPP": "by layers" if flags.get(_VIRTUAL_LAYERS) else "by number" if flags.get(_VIRTUAL_STAGES) else "no",
            "uneven stages": yes(flags.get("decoder_last_pipeline_num_layers")),
            "sequence parallel": yes(flags.get("sequence_parallel")),
            "optimizer": "distributed" if flags.get("use_distributed_optimizer") else flags["optimizer"],
            "recompute": flags.get("recompute_method") or flags.get("recompute_granularity") or "none",
            "micro-batches by": "tokens" if flags.get("use_dynamic_batch_size") else "samples",
            "balanced": yes(flags.get("balance_data")),
            "other order": yes(self.shuffled),
            "lengths": self.data["lengths"],
            "masked": self.data["mask"],
            "failed rewards": yes(self.data["failed"]),
            "loss": "of tokens" if flags.get("calculate_per_token_loss") else "of samples",
            "algorithm": "sft" if flags.get("loss_type") == "sft_loss" else flags["advantage_estimator"],
            "old policy": "another" if self.moved else "the same",
            "KL loss": kl,
            "KL in the reward": yes(flags.get("kl_coef")),
            "dual clip": yes(flags.get("eps_clip_c")),
            "importance weights": correction if weighted else "none",
            "router replay": yes(flags.get("use_routing_replay")),
            "family": self.model.family,
        }

    def __str__(self) -> str:
        text = " ".join(argv({**self.layout, **self.algorithm}))
        order = ", shuffled" if self.shuffled else ""
        return f"{self.seed}: {self.num_ranks} processes, {self.model}, {self.data}{order}: {text}"


SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}


def yes(value: Any) -> str:
    return "yes" if value else "no"


def argv(flags: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def draw(seed: int, root: Path, refused: dict[str, int] | None = None, *, num_ranks: int | None = None) -> Draw:
    """Return the draw of this seed; `refused` counts the rules' messages about draws before it.

    Args:
        num_ranks: 1, 2, 4 or 8; None: drawn too.
    """
    chance = random.Random(seed)
    for _ in range(MOST_TRIES):
        found = _candidate(seed, chance, num_ranks)
        try:
            found.args(root, cut=True)
            found.args(root, cut=False)
        except UsageError as error:
            for problem in error.problems:
                text = f"{problem.where}: {problem.rule}"
                if refused is not None:
                    refused[text] = refused.get(text, 0) + 1
            continue
        return found
    raise AssertionError(f"seed {seed}: the rules refuse everything: {refused}")


def _candidate(seed: int, chance: random.Random, num_ranks: int | None) -> Draw:
    if num_ranks is None:
        num_ranks = chance.choices(list(PROCESSES), list(PROCESSES.values()))[0]
    family = chance.choice((*DENSE, *MOE))
    groups = chance.choice((2, 4))
    tensor, pipeline, context = chance.choice(list(_sizes(num_ranks, groups)))
    num_layers = chance.choice([n for n in (2, 3, 4, 5, 6, 8) if n >= pipeline])
    model = Model(family, num_layers, groups)
    layout: Flags = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "sequence_parallel": tensor > 1 and (model.has_experts or chance.random() < 0.5),
        "balance_data": chance.random() < 0.5,
        "make_vocab_size_divisible_by": chance.choice((1, 8, 128)),
        "log_probs_chunk_size": chance.choice((3, 16, 1024)),
        **_stages(chance, num_layers, pipeline),
        **_experts(chance, model, num_ranks // pipeline, tensor),
        **_recompute(chance),
        **_micro_batches(chance),
    }
    algorithm = _algorithm(chance, model)
    if algorithm["optimizer"] == "adam":
        layout["use_distributed_optimizer"] = chance.random() < 0.7
    data: Flags = {
        "groups": chance.randint(2, 4),
        "group": chance.randint(2, 5),
        "lengths": chance.choice(("alike", "spread", "tiny", "one long")),
        "mask": chance.choice(("none", "some", "whole samples")),
        "failed": chance.random() < 0.2,
        "versions": chance.random() < 0.2,
        "routes": bool(algorithm.get("use_routing_replay")),
    }
    moved = chance.random() < 0.7
    return Draw(seed, model, num_ranks, layout, algorithm, data, moved, chance.random() < 0.5)


def _sizes(num_ranks: int, groups: int) -> Iterator[tuple[int, int, int]]:
    """Yield the possible (TP, PP, CP) of this many processes."""
    powers = [size for size in (1, 2, 4, 8) if num_ranks % size == 0]
    for tensor in powers:
        for pipeline in powers:
            for context in powers:
                small = tensor <= groups and pipeline <= 4 and context <= 4
                if small and num_ranks % (tensor * pipeline * context) == 0:
                    yield tensor, pipeline, context


def _stages(chance: random.Random, num_layers: int, stages: int) -> Flags:
    """Draw even stages, virtual stages, or a last stage of another size."""
    if stages == 1:
        return {}
    kinds: list[Flags] = [{"decoder_last_pipeline_num_layers": num_layers - (stages - 1)}]
    if num_layers % stages == 0:
        kinds.append({})
    virtual: list[Flags] = []
    for last in range(2, num_layers, 2):  # two virtual stages on each, also where the last is another size
        others, rest = divmod(num_layers - last, stages - 1)
        if others and not rest and others % 2 == 0:
            own = {} if last == others else {"decoder_last_pipeline_num_layers": last}
            virtual.append({**own, _VIRTUAL_STAGES: 2})
    if num_layers % stages == 0:
        layers = num_layers // stages
        virtual += [{_VIRTUAL_LAYERS: size} for size in range(1, layers) if layers % size == 0]
    return chance.choice(virtual if virtual and chance.random() < 0.5 else kinds)


def _experts(chance: random.Random, model: Model, ranks_of_stage: int, tensor: int) -> Flags:
    if not model.has_experts:
        return {}
    own = chance.choice((None, 1, 2))
    cut = tensor if own is None else own
    sizes = [size for size in (1, 2, 4) if NUM_EXPERTS % size == 0 and ranks_of_stage % (size * cut) == 0]
    if not sizes:
        own, sizes = None, [1]
    return {"expert_model_parallel_size": chance.choice(sizes), "expert_tensor_parallel_size": own}


def _recompute(chance: random.Random) -> Flags:
    full: Flags = {"recompute_granularity": "full", "recompute_num_layers": 1}
    kinds = [{}, {}, {"recompute_granularity": "selective"}]
    kinds += [{**full, "recompute_method": "uniform"}, {**full, "recompute_method": "block"}]
    return chance.choice(kinds)


def _micro_batches(chance: random.Random) -> Flags:
    if chance.random() < 0.3:
        return {"micro_batch_size": chance.randint(1, 4)}
    return {"use_dynamic_batch_size": True, "max_tokens_per_gpu": chance.choice((8, 20, 40, 80, 200))}


def _algorithm(chance: random.Random, model: Model) -> Flags:
    flags: Flags = {**chance.choice((SGD, ADAM))}
    flags |= {
        "clip_grad": chance.choice((0, 1)),
        "calculate_per_token_loss": chance.random() < 0.5,
        "rollout_temperature": chance.choice((0.7, 1, 1.3)),
    }
    if model.has_experts and chance.random() < 0.3:
        flags["use_routing_replay"] = True
    if chance.random() < 0.07:
        return {**flags, "loss_type": "sft_loss"}
    flags |= {
        "advantage_estimator": chance.choice(list(ESTIMATOR_FACTS)),
        "disable_grpo_std_normalization": chance.random() < 0.3,
        "normalize_advantages": chance.random() < 0.3,
        "eps_clip_high": chance.choice((None, 0.3)),
        "eps_clip_c": chance.choice((None, 1.5)),
        "entropy_coef": chance.choice((0, 0.02)),
        "kl_coef": chance.choice((0, 0, 0.1)),
    }
    if ESTIMATOR_FACTS[flags["advantage_estimator"]].discounts:
        flags |= {"gamma": chance.choice((1, 0.97)), "normalize_advantages": False}
    if chance.random() < 0.5:
        flags |= {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": chance.choice(("k1", "k2", "k3"))}
    if chance.random() < 0.4:
        flags |= {"use_tis": chance.random() < 0.5, "offpolicy_correction": chance.choice(("tis", "mis"))}
        flags |= {"tis_clip": 1.4, "tis_clip_low": 0.6}
    return flags


def samples(draw: Draw, attempt: int) -> TrainBatch:
    """Return the draw's samples; another `attempt` gives other samples of the same kind."""
    data = draw.data
    chance = np.random.default_rng((draw.seed, attempt))
    groups_N = np.repeat(np.arange(data["groups"]), data["group"])
    if len(groups_N) > 3:  # groups differ in size
        groups_N = np.delete(groups_N, chance.integers(len(groups_N)))
    size = len(groups_N)
    prompts_N, responses_N = chance.integers(1, 9, size), chance.integers(1, 30, size)
    if data["lengths"] == "alike":
        responses_N[:] = 12
    elif data["lengths"] == "tiny":
        responses_N = chance.integers(1, 4, size)
    elif data["lengths"] == "one long":
        responses_N = chance.integers(1, 6, size)
        responses_N[chance.integers(size)] = 70
    num_tokens, num_responses = int((prompts_N + responses_N).sum()), int(responses_N.sum())
    mask_R = np.ones(num_responses)
    if data["mask"] != "none":
        mask_R = (chance.random(num_responses) > 0.25).astype(np.float64)
    if data["mask"] == "whole samples":
        mask_R *= np.repeat(np.arange(size) % 3 != 1, responses_N)
    rewards_N = chance.integers(0, 2, size) + chance.random(size)
    if data["failed"]:
        rewards_N[chance.integers(size)] = np.nan
    columns: dict[str, Any] = {
        "tokens": chance.integers(0, VOCAB, num_tokens),
        "loss_mask": mask_R.astype(np.float32),
        "rewards": rewards_N.astype(np.float32),
        "group_indices": groups_N,
        "sample_indices": np.arange(size),
    }
    if data["versions"]:
        columns["policy_versions"] = chance.integers(0, 2, num_responses).astype(np.int32)
    if data["routes"] and "routed_experts" in COLUMNS:
        layers = draw.model.num_layers - (draw.model.family == "glm4_moe")
        scores = chance.random((num_tokens, layers, NUM_EXPERTS))
        columns["routed_experts"] = np.argsort(scores, axis=-1)[..., :TOPK].astype(np.int32)
    return TrainBatch(prompts_N + responses_N, responses_N, columns)


def other_log_probs(draw: Draw, attempt: int, log_probs_R: np.ndarray, batch: TrainBatch) -> TrainBatch:
    """Add log-probs of the engine and of the old policy that differ from the trained policy's."""
    chance = np.random.default_rng((draw.seed, attempt, 1))
    size = len(log_probs_R)
    whole_R = np.repeat(chance.choice([-0.4, -0.05, 0.05, 0.3], len(batch)), batch.response_lengths_N)
    if draw.moved:
        log_probs_R = log_probs_R + whole_R + chance.uniform(-0.3, 0.3, size)
        batch = batch.with_column("old_log_probs", log_probs_R)
    return batch.with_column("rollout_log_probs", log_probs_R + chance.uniform(-0.6, 0.6, size))
