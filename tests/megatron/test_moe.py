"""Mixtures of experts: against transformers, in every layout, through checkpoints and weight sync, and with replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_against_huggingface as reference
import tiny
import torch
from runs import Outcome, difference, train
from safetensors.torch import load_file
from worker_pool import WorkerPool, joined

from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.hf_dir(tmp_path_factory.mktemp(family), family) for family in tiny.MIXTURES}


def per_expert(tensors: dict[str, Any]) -> dict[str, Any]:
    """Rename transformers' tensors as files do: one tensor of all experts becomes one per expert."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, both in enumerate(tensor):
                for half, part in zip(("gate", "up"), np.split(both, 2), strict=True):
                    found[f"{head}.experts.{expert}.{half}_proj.weight"] = part
        elif kind == "down_proj":
            found |= {f"{head}.experts.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_logits_loss_and_gradients_match_transformers(
    family: str, workers: WorkerPool, mixtures: dict[str, Path]
) -> None:
    hf = mixtures[family]
    [found] = workers.run(1, reference._megatron, tiny.make_args(hf), hf, reference.LENGTHS)
    logits, loss, gradients = reference._huggingface(family)
    worst = reference._worst(found, (logits, loss, per_expert(gradients)))
    assert max(worst.values()) <= TOLERANCE, worst


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"moe_shared_expert_overlap": True, "moe_grouped_gemm": True}
"""Both flags change the order of operations at most; on a CPU the second has no effect."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2, ETP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP2, ETP1, distributed optimizer": (  # only experts are sharded: there is one data-parallel rank
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "expert_tensor_parallel_size": 1,
            "megatron_extra": OVERLAP,
        },
    ),
    "TP2 x EP2, ETP1": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "megatron_extra": OVERLAP,
        },
    ),
    "PP2 x EP2, recompute": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "decoder_last_pipeline_num_layers": 1,
            "expert_model_parallel_size": 2,
            **RECOMPUTE,
        },
    ),
    "CP2 x EP2, distributed optimizer": (
        4,
        {
            "context_parallel_size": 2,
            "max_tokens_per_gpu": 40,
            "expert_model_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
    ),
    "ETP2 x EP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
        },
    ),
}
FLAGS: dict[str, Any] = {"lr": 1e-2, "adam_eps": 1e-3, "clip_grad": 0.05, "entropy_coef": 0.01}


def outcome(workers: WorkerPool, hf: Path, size: int = 1, **flags: Any) -> Outcome:
    batches = [tiny.random_batch(seed=seed, with_rollout=False) for seed in (0, 1)]
    return workers.run(size, train, tiny.make_args(hf, **{**FLAGS, **flags}), batches)[-1]


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, mixtures: dict[str, Path]) -> dict[str, Outcome]:
    return {family: outcome(workers, hf) for family, hf in mixtures.items()}


def worst_of(found: Outcome, expected: Outcome, *, with_gradients: bool) -> dict[str, float]:
    worst = {
        "log-probs": float(np.abs(found.log_probs - expected.log_probs).max()),
        "weights": difference(found.weights, expected.weights),
    }
    if with_gradients:  # with a distributed optimizer a rank has only a part of them
        worst["gradients"] = difference(found.gradients, expected.gradients)
    for name in ("train/loss", "train/grad_norm"):
        pairs = zip(found.metrics, expected.metrics, strict=True)
        worst[name] = max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs)
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, workers: WorkerPool, mixtures: dict[str, Path], alone: dict[str, Outcome]) -> None:
    size, flags = LAYOUTS[layout]
    for family in tiny.MIXTURES:
        found = outcome(workers, mixtures[family], size, **flags)
        worst = worst_of(found, alone[family], with_gradients=not flags.get("use_distributed_optimizer"))
        print(layout, family, worst)
        assert max(worst.values()) <= TOLERANCE, (family, worst)


def dispatchers(rank: int, world_size: int, init_method: str, args: Any) -> list[tuple[str, bool]]:
    """Return the kind of each layer's dispatcher, and whether it runs the shared expert."""
    from slime.megatron.model.build import build_model

    with joined(args, rank, world_size, init_method):
        parts = [part for part in build_model(args, wrap=False)[0].modules() if hasattr(part, "token_dispatcher")]
        found: list[Any] = [part.token_dispatcher for part in parts]
        return [(type(each).__name__, each.shared_experts is not None) for each in found]


def test_dispatchers_follow_the_layout(workers: WorkerPool, mixtures: dict[str, Path]) -> None:
    """Without other ranks no tokens are sent; the shared expert overlaps only if asked to."""
    args = tiny.make_args(mixtures["glm4_moe"])
    assert workers.run(1, dispatchers, args)[0] == [("LocalDispatcher", False)] * 2
    sharing = replace(args, expert_model_parallel_size=2)
    for asked, expected in ((args, "LocalDispatcher"), (sharing, "MoEAlltoAllTokenDispatcher")):
        size = asked.expert_model_parallel_size
        found = workers.run(size, dispatchers, replace(asked, megatron_extra=OVERLAP))
        assert found == [[(expected, True)] * 2] * size


def with_routes(batch: Any, arch: Any, seed: int) -> Any:
    """Add random experts for every token of a sample but its last."""
    generator = np.random.default_rng(seed)
    scores = generator.random((int(batch.total_lengths_N.sum()), arch.num_moe_layers, arch.num_experts))
    routes = np.argsort(scores, axis=-1)[..., : arch.moe_router_topk].astype(np.int32)
    routes[np.cumsum(batch.total_lengths_N) - 1] = -1
    return batch.with_column("routed_experts", routes)


def transformers_with(hf: Path, routes: np.ndarray, batch: Any) -> np.ndarray:
    """Return log-probs of transformers' own model with its routers forced to the given experts."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    found: list[Any] = []
    starts = np.cumsum(batch.total_lengths_N) - batch.total_lengths_N
    given: list[Any] = [None] * len(layers)

    def replay(number: int, mlp: Any) -> Any:
        experts, config = mlp.experts, model.config

        def take(module: Any, inputs: Any) -> Any:
            hidden, indices, _ = inputs
            chosen = torch.where(given[number] >= 0, given[number], indices)
            logits = torch.nn.functional.linear(hidden, mlp.gate.weight)
            if config.model_type == "qwen3_moe":
                scores = logits.softmax(-1).gather(1, chosen)
                return hidden, chosen, scores / scores.sum(-1, keepdim=True)
            scores = logits.sigmoid().gather(1, chosen)
            return hidden, chosen, scores / scores.sum(-1, keepdim=True) * config.routed_scaling_factor

        experts.register_forward_pre_hook(take)

    for number, mlp in enumerate(layers):
        replay(number, mlp)
    for start, total, response in zip(starts, batch.total_lengths_N, batch.response_lengths_N, strict=True):
        ids = torch.from_numpy(batch.columns["tokens"][start : start + total])
        for number in range(len(layers)):
            given[number] = torch.from_numpy(routes[start : start + total, number]).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0] / 0.8
        at = torch.arange(total - response, total)
        found.append(logits.log_softmax(-1)[at - 1, ids[at]].numpy())
    return np.concatenate(found)


def replayed(rank: int, world_size: int, init_method: str, args: Any, batch: Any) -> tuple[np.ndarray, ...]:
    """Return log-probs with the batch's routes, without them, and of the reference model, which has its own routers."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        own = trainer.log_probs(batch.without("routed_experts"))
        return trainer.log_probs(batch), own, trainer.log_probs(batch, model="ref")
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {}),
        (4, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1, "context_parallel_size": 2}),
    ],
)
def test_replayed_experts_are_used(
    size: int, flags: dict[str, Any], workers: WorkerPool, mixtures: dict[str, Path]
) -> None:
    for hf in mixtures.values():
        args = tiny.make_args(hf, use_kl_loss=True, kl_loss_coef=0.1, use_routing_replay=True, **flags)
        batch = with_routes(tiny.random_batch(with_rollout=False), args.architecture, seed=1)
        forced, own, reference_model = workers.run(size, replayed, args, batch)[-1]
        expected = transformers_with(hf, batch.columns["routed_experts"], batch)
        assert np.abs(forced - expected).max() <= TOLERANCE * 10
        nobody = np.full_like(batch.columns["routed_experts"], -1)
        assert np.abs(own - transformers_with(hf, nobody, batch)).max() <= TOLERANCE * 10
        assert np.abs(forced - own).max() > 0.1  # control: without replay the log-probs differ
        assert np.abs(reference_model - own).max() <= TOLERANCE


def test_training_replays_in_every_layout(workers: WorkerPool, mixtures: dict[str, Path]) -> None:
    """Recomputed layers replay, too, although the micro-batch before them was another one."""
    flags = {**FLAGS, "use_routing_replay": True, "max_tokens_per_gpu": 60}
    for hf in mixtures.values():
        args = tiny.make_args(hf, **flags)
        batches = [with_routes(tiny.random_batch(seed=s, with_rollout=False), args.architecture, s) for s in (0, 1)]
        [expected] = workers.run(1, train, args, batches)
        layout = {**LAYOUTS["PP2 x EP2, recompute"][1], "use_routing_replay": True}
        found = workers.run(4, train, tiny.make_args(hf, **{**flags, **layout}), batches)[-1]
        worst = worst_of(found, expected, with_gradients=True)
        assert max(worst.values()) <= TOLERANCE, worst
        [without] = workers.run(1, train, tiny.make_args(hf, **{**flags, "use_routing_replay": False}), batches)
        assert difference(without.gradients, expected.gradients) > 0.1


BALANCE = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.01, "moe_router_bias_update_rate": 0.25}


def balance_by_hand(family: str, batch: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """Return the auxiliary losses' gradients of one micro-batch, router biases after the step, and losses by metric.

    Gradients are computed in float64 through transformers. The losses are Switch Transformer's (arXiv:2101.03961,
    equation 4, over k choices per token) and ST-MoE's z-loss (arXiv:2202.08906, equation 5), of each layer over all
    tokens.
    """
    import torch

    model: Any = tiny.hf_model(family).double()
    model.set_experts_implementation("eager")  # the other implementations have no float64
    layers = {number: layer.mlp for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    seen: dict[int, list[tuple[Any, Any]]] = {number: [] for number in layers}
    for number, mlp in layers.items():
        mlp.experts.register_forward_pre_hook(
            lambda module, inputs, number=number: seen[number].append((inputs[0], inputs[1]))
        )
    starts = np.cumsum(batch.total_lengths_N) - batch.total_lengths_N
    for start, total in zip(starts, batch.total_lengths_N, strict=True):
        model(torch.from_numpy(batch.columns["tokens"][start : start + total])[None])
    balancing: Any = 0.0
    z_loss: Any = 0.0
    biases: dict[str, Any] = {}
    for number, mlp in layers.items():
        hidden, chosen = (torch.cat(parts) for parts in zip(*seen[number], strict=True))
        logits = hidden @ mlp.gate.weight.T
        scores = logits.softmax(-1)
        if family == "glm4_moe":
            scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        num_experts = scores.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=num_experts)
        shares = counts / chosen.numel()
        balancing = balancing + num_experts * (shares * scores.mean(0)).sum()
        z_loss = z_loss + logits.logsumexp(-1).square().mean()
        if family == "glm4_moe":
            moved = BALANCE["moe_router_bias_update_rate"] * torch.sign(counts.double().mean() - counts)
            name = f"model.layers.{number}.mlp.gate.e_score_correction_bias"
            biases[name] = (mlp.gate.e_score_correction_bias + moved).float().numpy()
    loss = BALANCE["moe_aux_loss_coeff"] * balancing + BALANCE["moe_z_loss_coeff"] * z_loss
    loss.backward()
    found = {
        name: np.zeros(tuple(parameter.shape)) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }
    losses = {"loss": float(loss), "load_balancing_loss": float(balancing), "z_loss": float(z_loss), "token_loss": 0.0}
    return per_expert(found), biases, losses


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, RECOMPUTE),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2, "max_tokens_per_gpu": 1000}),
        (2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}),
    ],
)
def test_auxiliary_losses_and_router_biases(
    size: int, flags: dict[str, Any], workers: WorkerPool, mixtures: Any
) -> None:
    """Equal rewards make the policy's own gradient 0: what is left comes from the auxiliary losses."""
    batch = tiny.random_batch(with_rollout=False)
    batch = batch.with_column("rewards", np.ones(len(batch), dtype=np.float32))
    flags = {"max_tokens_per_gpu": 2000, "clip_grad": 0.0, **BALANCE, "expert_tensor_parallel_size": 1, **flags}
    for family, hf in mixtures.items():
        found = workers.run(size, train, tiny.make_args(hf, **flags), [batch])[-1]
        gradients, biases, losses = balance_by_hand(family, batch)
        assert difference(found.gradients, gradients) <= 1e-4
        for name, loss in losses.items():  # the logged losses are the minimised ones
            assert found.metrics[0][f"train/{name}"] == pytest.approx(loss, rel=1e-5, abs=1e-6), name
        for name, bias in biases.items():
            assert np.abs(found.weights[name] - bias).max() <= 1e-6, name
        assert bool(biases) == (family == "glm4_moe")


def slope(rank: int, world_size: int, init_method: str, args: Any, batch: Any) -> tuple[dict[str, float], list[Any]]:
    """Return metrics of a step at learning rate 0, and of two with weights moved along and against the gradient."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        metrics = trainer.train(0, batch)
        parameters: list[Any] = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
        begun = [parameter.detach().clone() for parameter in parameters]
        steps = [STEP * parameter.main_grad / metrics["train/grad_norm"] for parameter in parameters]
        found: list[Any] = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, start, step in zip(parameters, begun, steps, strict=True):
                    parameter.copy_(start + sign * step)
            found.append(trainer.train(0, batch))
        return metrics, found
    finally:
        trainer.close()


STEP = 1e-3
"""The distance that weights move, large enough that float32 shows the difference of the two losses."""


def likelihood(inputs: Any, options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss whose value belongs to its gradient; that is not so for a policy loss at a ratio of 1."""
    return -inputs.log_probs_R, {}


@pytest.mark.parametrize(
    ("size", "cut"),
    [
        (1, {}),
        (2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1, **RECOMPUTE}),
        (2, LAYOUTS["TP2, ETP2"][1]),
    ],
)
def test_the_logged_loss_is_the_minimised_one(
    size: int, cut: dict[str, Any], workers: WorkerPool, mixtures: Any
) -> None:
    """Along the gradient the loss rises by the gradient's norm, in all layouts; without auxiliary losses it does not.

    Replayed experts keep the loss smooth: a token does not change experts when the weights move.
    """
    flags = {
        "lr": 0.0,
        "clip_grad": 0.0,
        **BALANCE,
        **cut,
        "moe_router_bias_update_rate": 0.0,
        "max_tokens_per_gpu": 60,
    }
    flags |= {"use_distributed_optimizer": False, "use_routing_replay": True}
    flags |= {"loss_type": "custom_loss", "custom_loss_function_path": "test_moe.likelihood"}
    args = tiny.make_args(mixtures["glm4_moe"], **flags)
    batch = with_routes(tiny.random_batch(), args.architecture, seed=0)
    metrics, (up, down) = workers.run(size, slope, args, batch)[-1]

    def rise(name: str) -> float:
        return (up[name] - down[name]) / (2 * STEP) / metrics["train/grad_norm"]

    parts = {"load_balancing_loss": BALANCE["moe_aux_loss_coeff"], "z_loss": BALANCE["moe_z_loss_coeff"]}
    whole = metrics["train/token_loss"] + sum(share * metrics[f"train/{name}"] for name, share in parts.items())
    print(cut, rise("train/loss"), rise("train/token_loss"))
    assert metrics["train/loss"] == pytest.approx(whole, rel=1e-12)
    assert rise("train/loss") == pytest.approx(1, abs=2e-3)
    assert rise("train/token_loss") < 0.95  # control


def saved(rank: int, world_size: int, init_method: str, args: Any, batch: Any) -> None:
    """Take one step, and save a checkpoint of it under --save."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        trainer.train(0, batch)
        trainer.save(0, {})
    finally:
        trainer.close()


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_resumes_in_other_layouts(
    distributed: bool, workers: WorkerPool, mixtures: dict[str, Path], alone: dict[str, Outcome], tmp_path: Path
) -> None:
    """A save at EP 2 after one step continues with the second step of one process, whose Adam needs the moments."""
    batches = [tiny.random_batch(seed=seed, with_rollout=False) for seed in (0, 1)]
    family = tiny.MIXTURES[int(distributed)]
    flags = {**FLAGS, "use_distributed_optimizer": distributed, "expert_model_parallel_size": 2}
    path = str(tmp_path / "checkpoint")
    workers.run(2, saved, tiny.make_args(mixtures[family], **flags, save=path), batches[0])
    for size, layout in (
        (1, {"expert_model_parallel_size": 1}),
        (2, {"expert_model_parallel_size": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ):
        args = tiny.make_args(mixtures[family], **{**flags, **layout}, load=path)
        found = workers.run(size, train, args, batches[1:])[-1]
        assert difference(found.weights, alone[family].weights) <= TOLERANCE
        assert found.metrics[0]["train/grad_norm"] == pytest.approx(alone[family].metrics[1]["train/grad_norm"], 1e-5)


def exported(rank: int, world_size: int, init_method: str, args: Any) -> dict[str, Any]:
    """Return the tensors that engines and an export get."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        return {name: tensor.clone() for name, tensor in trainer.iter_hf_tensors()}
    finally:
        trainer.close()


def test_weights_are_exported_as_they_were_loaded(workers: WorkerPool, mixtures: dict[str, Path]) -> None:
    for hf in mixtures.values():
        files = load_file(hf / "model.safetensors")
        for layout in ("EP2", "ETP2 x EP2", "PP2 x EP2, recompute"):
            size, flags = LAYOUTS[layout]
            for found in workers.run(size, exported, tiny.make_args(hf, **flags)):
                assert found.keys() == files.keys()
                assert all(found[name].equal(tensor) for name, tensor in files.items())
        [found] = workers.run(1, exported, tiny.make_args(hf, bf16=True))
        for name, tensor in files.items():  # a router's bias stays float32
            assert found[name].equal(tensor if name.endswith("correction_bias") else tensor.bfloat16()), name
