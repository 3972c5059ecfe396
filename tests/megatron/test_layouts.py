"""Every family at every layout against an independent step: transformers' model, the papers' loss, torch's AdamW.

The tests compare log-probs before the step, loss and gradient norm, and the weights after it. Weights come in from a
Hugging Face directory and are exported bit for bit, and every layout loads what any other has saved.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import Arrays, difference
from torch import Tensor
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.checkpoint.save_load import find_checkpoint, load_checkpoint
from slime.megatron.microbatch import ContextParallel
from slime.megatron.model.attention import pack_sequences
from slime.megatron.model.build import unwrap
from slime.megatron.trainer import Trainer
from slime.models.hf_files import HFReader

pytestmark = pytest.mark.dist

FAMILIES = (*tiny.FAMILIES, "qwen3-tied")
TIED = "qwen2"
SINGLE = "1 process"
CP2 = {"context_parallel_size": 2, "max_tokens_per_gpu": 40}
"""Flags with a budget so small that there are several micro-batches."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    SINGLE: (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2 x PP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "PP2 x DP2, distributed optimizer": (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "CP2, distributed optimizer": (2, {**CP2, "use_distributed_optimizer": True}),
}
"""Each layout's number of processes and its flags."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CP_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP4": (4, {"context_parallel_size": 4, "max_tokens_per_gpu": 20}),
    "TP2 x CP2, distributed optimizer, recompute": (
        4,
        {
            **CP2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            **RECOMPUTE,
        },
    ),
    "PP2 x CP2": (4, {**CP2, "pipeline_model_parallel_size": 2}),
    "DP2 x CP2, distributed optimizer": (4, {**CP2, "use_distributed_optimizer": True}),
    "CP2, selective recompute": (2, {**CP2, "recompute_granularity": "selective"}),
}
"""The layouts for which one family is enough."""
VPP2: dict[str, Any] = {
    "pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 1,
    "max_tokens_per_gpu": 40,
}
VIRTUAL = "PP2 x VPP2"
SHARDED_BY_ALL = "TP2 x PP2 x VPP2, distributed optimizer, recompute"
VPP_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    VIRTUAL: (2, VPP2),
    "PP2 x VPP2, distributed optimizer": (2, {**VPP2, "use_distributed_optimizer": True}),
    "PP2 x VPP2, groups of 3": (
        2,
        # each sample is a pack, and there are 8 of them: an empty one has to be added
        {**VPP2, "max_tokens_per_gpu": 8, "megatron_extra": {"microbatch_group_size_per_vp_stage": 3}},
    ),
    SHARDED_BY_ALL: (
        4,
        {
            **VPP2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            **RECOMPUTE,
        },
    ),
    "PP2 x VPP2 x CP2, selective recompute": (
        4,
        {**VPP2, "context_parallel_size": 2, "max_tokens_per_gpu": 20, "recompute_granularity": "selective"},
    ),
    "PP2 x VPP2 x DP2, distributed optimizer, reduced on the way": (
        4,
        {**VPP2, "use_distributed_optimizer": True, "megatron_extra": {"overlap_grad_reduce": True}},
    ),
}
"""Layouts of a model of four layers."""
UNEVEN_VPP_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2 x VPP2, fewer layers on the last": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
            "decoder_last_pipeline_num_layers": 2,
            "max_tokens_per_gpu": 40,
        },
    ),
    "PP3 x VPP2, no overlap": (
        3,
        {**VPP2, "pipeline_model_parallel_size": 3, "megatron_extra": {"overlap_p2p_comm": False}},
    ),
}
"""Layouts of a model of six layers."""
ALL = {**LAYOUTS, **CP_LAYOUTS, **VPP_LAYOUTS, **UNEVEN_VPP_LAYOUTS}

TOLERANCE = 1e-5
STEP_TOLERANCE = 1e-3
"""The tolerance relative to what a step moves. That is far less than the weights, and rounding if the gradient is."""
FLAGS: dict[str, Any] = {
    "lr": 1e-2,
    "adam_eps": 1e-3,  # a small one makes Adam's first step lr x sign(gradient): full steps even for mere rounding
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "entropy_coef": 0.01,
}


@dataclass(frozen=True)
class Expected:
    """The independent result: log-probs before the first step, then each step's numbers and the weights after it."""

    log_probs: np.ndarray
    losses: list[float]
    norms: list[float]
    start: Arrays
    weights: list[Arrays]


def _batches() -> list[TrainBatch]:
    return [tiny.random_batch(seed=seed, with_rollout=False) for seed in (0, 1)]


def _arrays(model: torch.nn.Module) -> Arrays:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def _log_prob_rows(model: torch.nn.Module, batch: TrainBatch, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Return log-probs and entropies of each sample's response, one sample after another, nothing packed."""
    found: list[tuple[Tensor, Tensor]] = []
    for row, length in zip(batch.rows("tokens"), batch.response_lengths_N.tolist(), strict=True):
        tokens = torch.from_numpy(row)
        log_probs = (model(tokens[None]).logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
        chosen = log_probs.gather(1, tokens[-length:, None])[:, 0]
        found.append((chosen, -(log_probs.exp() * log_probs).sum(-1)))
    return found


def _loss(model: torch.nn.Module, reference: torch.nn.Module, batch: TrainBatch, temperature: float) -> Tensor:
    """GRPO (arXiv:2402.03300): mean over samples of each one's mean over tokens; the old policy is the current one."""
    with torch.no_grad():
        reference_rows = _log_prob_rows(reference, batch, temperature)
    rewards, groups = batch.columns["rewards"], batch.columns["group_indices"]
    losses: list[Tensor] = []
    for row, (chosen, entropy) in enumerate(_log_prob_rows(model, batch, temperature)):
        group = rewards[groups == groups[row]]
        advantage = float((rewards[row] - group.mean()) / (group.std(ddof=1) + 1e-6))
        gap = reference_rows[row][0] - chosen
        per_token = (
            -(chosen - chosen.detach()).exp() * advantage
            + FLAGS["kl_loss_coef"] * (gap.exp() - gap - 1)
            - FLAGS["entropy_coef"] * entropy
        )
        mask = torch.from_numpy(batch.rows("loss_mask")[row])
        losses.append((per_token * mask).sum() / mask.sum())
    return torch.stack(losses).mean()


@cache
def _expected(family: str, num_layers: int = 2) -> Expected:
    model = tiny.hf_model(family, num_layers=num_layers)
    reference = tiny.hf_model(family, seed=1, num_layers=num_layers)
    args = Args()
    temperature = 0.8
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        # Megatron does not decay biases and norms
        [{"params": matrices, "weight_decay": FLAGS["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=FLAGS["lr"],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=FLAGS["adam_eps"],
    )
    batches = _batches()
    with torch.no_grad():
        log_probs = torch.cat([chosen for chosen, _ in _log_prob_rows(model, batches[0], temperature)])
    found = Expected(log_probs.numpy(), [], [], _arrays(model), [])
    for batch in batches:
        optimizer.zero_grad()
        loss = _loss(model, reference, batch, temperature)
        loss.backward()
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), FLAGS["clip_grad"])))
        optimizer.step()
        found.losses.append(loss.item())
        found.weights.append(_arrays(model))
    return found


@dataclass
class Found:
    names: list[str]
    log_probs: np.ndarray
    metrics: dict[str, float]
    weights: Arrays
    layers: list[list[int]]
    """The layer numbers in each part of the model that this rank holds."""
    tied: list[Tensor]
    """This rank's rows of the embedding and of a tied output layer, if it has them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that makes directories of a family's actor and of its reference."""

    @cache
    def directories(family: str, num_layers: int = 2) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(family)
        actor, reference = (
            tiny.hf_dir(root / name, family, seed=seed, num_layers=num_layers)
            for seed, name in enumerate(("actor", "reference"))
        )
        return actor, reference

    return directories


def _args(models: Callable[..., tuple[Path, Path]], family: str, layout: str, **changes: Any) -> Args:
    actor, reference = models(family, changes.pop("num_layers", 2))
    return tiny.make_args(
        actor, **{**FLAGS, **ALL[layout][1], "load": str(actor), "ref_load": str(reference), **changes}
    )


class _Shifted(Trainer):
    """A bug: each stage names its layers as if it were another stage."""

    def load(self) -> Any:
        for chunk in self.model:
            layers: Any = unwrap(chunk).decoder.layers
            for layer in layers:
                layer.layer_number = self._arch.num_layers + 1 - layer.layer_number
        return super().load()


class _Swapped(Trainer):
    """A bug: the parts of the model on each stage are exchanged."""

    def load(self) -> Any:
        first, second = ([*cast(Any, unwrap(chunk)).decoder.layers] for chunk in self.model)
        for one, other in zip(first, second, strict=True):
            one.layer_number, other.layer_number = other.layer_number, one.layer_number
        return super().load()


class _Neighbour(Trainer):
    """A bug: each context-parallel rank takes its neighbour's chunks."""

    @property
    def _context(self) -> ContextParallel:
        return replace(super()._context, rank=(self.topology.cp_rank + 1) % self.topology.cp_size)


def _unshared() -> AbstractContextManager[Any]:
    """A bug: both copies of a tied embedding keep their own gradient."""
    return patch("megatron.core.distributed.finalize_model_grads._allreduce_word_embedding_grads")


def _unsummed() -> AbstractContextManager[Any]:
    """A bug: a rank keeps only its own queries' gradient of its keys and values."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None

    return patch("slime.megatron.model.attention._Gather.backward", backward)


def _from_nought() -> AbstractContextManager[Any]:
    """A bug: positions begin at 0 in each piece."""

    def sequences(lengths_P: list[int], arch: Any, share: Any) -> Any:
        turned = pack_sequences(lengths_P, arch)
        return replace(pack_sequences(lengths_P, arch, share), cos_B=turned.cos_B, sin_B=turned.sin_B)

    return patch("slime.megatron.microbatch.pack_sequences", sequences)


TRAINERS: dict[str | None, type[Trainer]] = {"shifted": _Shifted, "swapped": _Swapped, "neighbour": _Neighbour}
BUGS: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    "unshared": _unshared,
    "unsummed": _unsummed,
    "from nought": _from_nought,
}


def _one_step(rank: int, world_size: int, init_method: str, args: Args, export: Path, bug: str | None = None) -> Found:
    """Load, export, take one step, save."""
    trainer = TRAINERS.get(bug, Trainer)(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        trainer.save_hf(export)
        names = [name for name, _ in trainer.iter_hf_tensors()]
        batch = _batches()[0]
        with BUGS.get(bug, nullcontext)():
            log_probs = trainer.log_probs(batch)
            metrics = trainer.train(0, batch)
        if args.save is not None:
            trainer.save(0, {})
        parts: list[Any] = [unwrap(chunk).decoder.layers for chunk in trainer.model]
        layers = [[layer.layer_number for layer in part] for part in parts]
        return Found(names, log_probs, metrics, runs.weights(trainer), layers, _tied(trainer))
    finally:
        trainer.close()


def _tied(trainer: Trainer) -> list[Tensor]:
    cores = [core for core in map(unwrap, trainer.model) if core.pre_process or core.post_process]
    return [
        core.shared_embedding_or_output_weight().detach().clone()
        for core in cores
        if core.share_embeddings_and_output_weights
    ]


def _run(workers: WorkerPool, args: Args, layout: str, tmp_path: Path, bug: str | None = None) -> Found:
    """Return rank 0's result, after a check that every rank has the same."""
    found = workers.run(ALL[layout][0], _one_step, args, tmp_path / "export", bug)
    for other in found[1:]:
        assert other.metrics == found[0].metrics
        assert np.array_equal(other.log_probs, found[0].log_probs) and other.names == found[0].names
        assert difference(other.weights, found[0].weights) == 0
    return replace(found[0], tied=[rows for rank in found for rows in rank.tied])


def _misses(found: Found, expected: Expected) -> dict[str, float]:
    """Return the error of each compared quantity, in units of its tolerance."""
    start, weights = expected.start, expected.weights[0]
    moved = {name: found.weights[name] - start[name] for name in start}
    loss, norm = (found.metrics[f"train/{name}"] for name in ("loss", "grad_norm"))
    return {
        "log-probs": difference({"": found.log_probs}, {"": expected.log_probs}) / TOLERANCE,
        "loss": abs(loss / expected.losses[0] - 1) / TOLERANCE,
        "norm": abs(norm / expected.norms[0] - 1) / TOLERANCE,
        "weights": difference(found.weights, weights) / TOLERANCE,
        "move": difference(moved, {name: weights[name] - start[name] for name in start}) / STEP_TOLERANCE,
    }


def _same_bits(export: Path, source: Path) -> bool:
    found, expected = HFReader(export), HFReader(source)
    return sorted(found.names()) == sorted(expected.names()) and all(
        torch.equal(found.get(name), expected.get(name)) for name in expected.names()
    )


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in LAYOUTS] + [("glm4", layout) for layout in CP_LAYOUTS],
)
def test_one_step(family: str, layout: str, workers: WorkerPool, models: Any, tmp_path: Path) -> None:
    found = _run(workers, _args(models, family, layout), layout, tmp_path)
    misses = _misses(found, _expected(family))
    print(family, layout, {k: round(v, 3) for k, v in misses.items()})
    assert max(misses.values()) <= 1, misses
    assert _same_bits(tmp_path / "export", models(family)[0])


@pytest.mark.parametrize(
    ("family", "num_layers", "layout"),
    [("glm4", 4, layout) for layout in VPP_LAYOUTS]
    + [(TIED, 4, VIRTUAL)]
    + [(TIED, 6, layout) for layout in UNEVEN_VPP_LAYOUTS],
)
def test_virtual_stages(
    family: str, num_layers: int, layout: str, workers: WorkerPool, models: Any, tmp_path: Path
) -> None:
    found = _run(workers, _args(models, family, layout, num_layers=num_layers), layout, tmp_path)
    misses = _misses(found, _expected(family, num_layers))
    print(family, layout, {k: round(v, 3) for k, v in misses.items()})
    assert max(misses.values()) <= 1, misses
    assert _same_bits(tmp_path / "export", models(family, num_layers)[0])
    assert found.layers == ([[1], [3]] if num_layers == 4 else [[1, 2], [4, 5]] if "fewer" in layout else [[1], [4]])
    group = 3 if "groups" in layout or "PP3" in layout else 2
    assert found.metrics["train/num_micro_batches"] % group == 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "PP2" in name])
def test_both_copies_of_a_tied_embedding_stay_equal(
    layout: str, bf16: bool, workers: WorkerPool, models: Any, tmp_path: Path
) -> None:
    """The first stage embeds with it, the last one predicts with its copy, and each has half of the gradient."""
    tied = _run(workers, _args(models, TIED, layout, bf16=bf16), layout, tmp_path).tied
    assert len(tied) == ALL[layout][0]
    first, last = tied[: len(tied) // 2], tied[len(tied) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_controls(workers: WorkerPool, models: Any, tmp_path: Path) -> None:
    """Each bug is noticed, and by the comparison that should notice it."""

    def misses(bug: str | None = None, layout: str = "PP2", **flags: Any) -> tuple[set[str], Found]:
        found = _run(workers, _args(models, TIED, layout, **flags), layout, tmp_path, bug)
        return {name for name, miss in _misses(found, _expected(TIED)).items() if miss > 1}, found

    wrong, _ = misses("shifted")
    assert wrong == {"log-probs", "loss", "norm", "weights", "move"}
    assert _same_bits(tmp_path / "export", models(TIED)[0])  # load and export cancel: a round trip does not notice it
    wrong, found = misses("unshared")
    assert wrong == {"norm", "weights", "move"} and not torch.equal(*found.tied)
    wrong, _ = misses(calculate_per_token_loss=True)  # another denominator
    assert wrong == {"loss", "norm", "weights", "move"}
    wrong, _ = misses(clip_grad=1.0)
    assert wrong == {"weights", "move"}
    found = _run(workers, _args(models, TIED, VIRTUAL, num_layers=4), VIRTUAL, tmp_path, "swapped")
    wrong = {name for name, miss in _misses(found, _expected(TIED, 4)).items() if miss > 1}
    assert wrong == {"log-probs", "loss", "norm", "weights", "move"}
    assert _same_bits(tmp_path / "export", models(TIED, 4)[0])
    cut = "CP2, distributed optimizer"
    wrong, _ = misses("unsummed", cut)
    assert wrong == {"norm", "weights", "move"}
    for bug in ("from nought", "neighbour"):
        wrong, _ = misses(bug, cut)
        assert wrong == {"log-probs", "loss", "norm", "weights", "move"}, bug


@pytest.mark.parametrize("last", [1, 2])
def test_uneven_stages(last: int, workers: WorkerPool, models: Any, tmp_path: Path) -> None:
    args = _args(models, TIED, "PP2", num_layers=3, decoder_last_pipeline_num_layers=last)
    found = workers.run(2, _one_step, args, tmp_path / "export")
    assert [[len(part) for part in stage.layers] for stage in found] == [[3 - last], [last]]
    misses = _misses(found[0], _expected(TIED, num_layers=3))
    assert max(misses.values()) <= 1, misses
    assert _same_bits(tmp_path / "export", models(TIED, 3)[0])


def test_one_stage_is_the_whole_model(workers: WorkerPool, models: Any, tmp_path: Path) -> None:
    """Megatron alone would build only the last stage's layers."""
    args = _args(models, TIED, SINGLE, num_layers=3, decoder_last_pipeline_num_layers=1)
    assert workers.run(1, _one_step, args, tmp_path / "export")[0].layers == [[1, 2, 3]]


def _second_steps(
    rank: int, world_size: int, init_method: str, args: Args, saved: dict[str, str], with_optimizer: bool
) -> dict[str, Found]:
    """Take one more step from each checkpoint, all in this layout."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()  # loads the reference
        batch = _batches()[1]
        found: dict[str, Found] = {}
        for name, path in saved.items():
            checkpoint = find_checkpoint(path)
            assert checkpoint is not None
            load_checkpoint(checkpoint, model=trainer.model, optimizer=trainer.optimizer if with_optimizer else None)
            log_probs = trainer.log_probs(batch)
            metrics = trainer.train(1, batch)
            found[name] = Found([], log_probs, metrics, runs.weights(trainer), [], _tied(trainer))
        return found
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("layouts", "num_layers"),
    [
        (tuple(LAYOUTS), 2),
        ((SINGLE, "PP2 x DP2, distributed optimizer", VIRTUAL, SHARDED_BY_ALL), 4),
    ],
    ids=["all", "virtual stages"],
)
def test_layouts_resume_from_each_other(
    layouts: tuple[str, ...], num_layers: int, workers: WorkerPool, models: Any, tmp_path_factory: Any
) -> None:
    """Save after the first step, load, take the second step: it notices a missing optimizer state.

    Each layout loads what three others saved, and each is loaded by three: a saved file does not know who loads it.
    """
    family = TIED
    root = tmp_path_factory.mktemp("saved")
    saved = {layout: str(root / layout) for layout in layouts}

    def args_of(layout: str, **flags: Any) -> Args:
        return _args(models, family, layout, num_layers=num_layers, **flags)

    for layout, path in saved.items():
        workers.run(ALL[layout][0], _one_step, args_of(layout, save=path), root / "export")
    expected = _expected(family, num_layers).weights[1]
    log_probs: list[np.ndarray] = []
    for place, layout in enumerate(layouts):
        sources = {(place + distance) % len(layouts) for distance in (1, 2, 4)}
        some = {name: path for at, (name, path) in enumerate(saved.items()) if at in sources}
        for found in workers.run(ALL[layout][0], _second_steps, args_of(layout), some, True):
            for source, after in found.items():
                log_probs.append(after.log_probs)
                assert difference({"": after.log_probs}, {"": log_probs[0]}) <= TOLERANCE, (source, layout)
                assert difference(after.weights, expected) <= TOLERANCE, (source, layout)
    for layout in (layouts[0], layouts[2]):  # controls: wrong moments, no moments
        some = {name: saved[name] for name in layouts[1:3]}
        found = workers.run(ALL[layout][0], _second_steps, args_of(layout), some, False)[0]
        assert all(difference(after.weights, expected) > 10 * TOLERANCE for after in found.values())
