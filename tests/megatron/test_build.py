"""Configs from arguments: fields that pass through, contradictions, and schedules that are impossible."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.config.flags.table import FlagSpec, all_flags
from slime.config.rules.megatron_fields import HARMLESS
from slime.config.rules.not_built import NOT_BUILT_MEGATRON
from slime.core.architecture import padded_vocab_size
from slime.megatron.model.build import PolicyModel, build_model, named_parameters, transformer_config
from slime.megatron.optim.optimizer import build_optimizer, total_steps


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "glm4")


def test_megatrons_own_fields_pass_through(hf: Path) -> None:
    args = tiny.make_args(hf, megatron_extra={"init_method_std": 0.5, "moe_router_topk": 4})
    assert transformer_config(args).init_method_std == 0.5
    agreeing = tiny.make_args(hf, megatron_extra={"bias_dropout_fusion": False})
    assert transformer_config(agreeing).bias_dropout_fusion is False


def test_a_field_that_slime_decides_is_refused(hf: Path) -> None:
    with pytest.raises(ValueError, match="--bias-dropout-fusion True: slime sets it to False itself"):
        transformer_config(tiny.make_args(hf, megatron_extra={"bias_dropout_fusion": True}))
    with pytest.raises(ValueError, match=r"--attention-dropout 0.1"):
        transformer_config(tiny.make_args(hf, attention_dropout=0.1))
    with pytest.raises(ValueError, match="--hf-checkpoint"):
        transformer_config(Args())


def test_attention_backends_of_two_models_may_differ(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")  # as Megatron's model with the second backend would set it
    for backend in ("flash", "fused"):
        config = transformer_config(tiny.make_args(hf, attention_backend=backend))
        assert config.attention_backend.name == backend
        PolicyModel._set_attention_backend(SimpleNamespace(config=config))  # pyright: ignore[reportArgumentType]


def test_steps_of_the_run(hf: Path) -> None:
    assert total_steps(tiny.make_args(hf, num_rollout=7, num_steps_per_rollout=3)) == 21
    assert total_steps(tiny.make_args(hf, num_rollout=0)) == 0


def _build(rank: int, world_size: int, init_method: str, args: Args) -> dict[str, tuple[int, ...]]:
    """Return the shapes of this rank's parameters."""
    with joined(args, rank, world_size, init_method):
        model = build_model(args, wrap=True)
        build_optimizer(args, model)
        return {name: tuple(parameter.shape) for name, parameter in named_parameters(model)}


@pytest.mark.dist
def test_parameters_of_a_tensor_parallel_rank(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, tensor_model_parallel_size=2)
    shapes, other = workers.run(2, _build, args)
    assert shapes == other
    rows = padded_vocab_size(tiny.VOCAB, 128, 2) // 2
    assert shapes["embedding.word_embeddings.weight"] == (rows, 64) == shapes["output_layer.weight"]
    assert shapes["decoder.layers.1.self_attention.linear_qkv.bias"] == ((4 + 2 * 2) * 16 // 2,)
    assert shapes["decoder.layers.1.post_mlp_layernorm.weight"] == (64,)


@pytest.mark.dist
def test_parameters_of_pipeline_stages(workers: WorkerPool, tmp_path: Path) -> None:
    """Layers have their number in the whole model; a tied output layer has the name of the embedding that it copies."""
    hf = tiny.hf_dir(tmp_path, "qwen2", num_layers=4)
    args = tiny.make_args(hf, pipeline_model_parallel_size=3, decoder_last_pipeline_num_layers=2)
    stages = [set(shapes) for shapes in workers.run(3, _build, args)]
    (whole,) = workers.run(1, _build, tiny.make_args(hf))
    embedding, norm = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
    assert [embedding in stage for stage in stages] == [True, False, True]
    assert [norm in stage for stage in stages] == [False, False, True]
    layers = [{name.split(".")[2] for name in stage if name.startswith("decoder.layers.")} for stage in stages]
    assert layers == [{"0"}, {"1"}, {"2", "3"}]
    assert set.union(*stages) == set(whole)


def _rates(rank: int, world_size: int, init_method: str, args: Args, steps: list[int]) -> list[float]:
    """Return the learning rate after each number of further steps."""
    rates: list[float] = []
    with joined(args, rank, world_size, init_method):
        optimizer, schedule = build_optimizer(args, build_model(args, wrap=True))
        for number in steps:
            schedule.step(number)
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.dist
def test_a_long_warm_up_of_a_constant_rate(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, lr=1e-3, lr_warmup_iters=100)
    assert workers.run(1, _rates, args, [50, 50, 50]) == [pytest.approx([5e-4, 1e-3, 1e-3])]


@pytest.mark.dist
@pytest.mark.parametrize("style", ["cosine", "WSD"])
def test_a_run_that_only_evaluates_needs_no_schedule(style: str, workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, num_rollout=0, lr=1e-3, lr_decay_style=style, lr_warmup_iters=5)
    assert workers.run(1, _rates, args, [5, 50]) == [pytest.approx([1e-3, 1e-3])]


def _another_value(spec: FlagSpec) -> Any:
    texts: dict[str, Any] = {
        "cross_entropy_fusion_impl": "te",
        "recompute_modules": ["core_attn"],
        "cp_comm_type": "p2p",
    }
    if spec.kind == "bool":
        return not spec.default
    return texts[spec.name] if spec.kind == "str" else (spec.default or 0) + 1


@pytest.mark.dist
def test_harmless_fields_do_not_change_the_model(workers: WorkerPool, hf: Path) -> None:
    """Set all of them at once: log-probs and gradients stay. Control: a field of the attention changes both."""

    def outcome(extra: dict[str, Any]) -> runs.Outcome:
        args = tiny.make_args(hf, lr=0.0, megatron_extra=extra)
        [found] = workers.run(1, runs.train, args, [tiny.random_batch()])
        return found

    specs = {spec.name: spec for spec in all_flags() if spec.source == "megatron"}
    built = HARMLESS.difference(NOT_BUILT_MEGATRON)
    assert len(built) > 30
    plain = outcome({})
    harmless = outcome({name: _another_value(specs[name]) for name in sorted(built)})
    np.testing.assert_allclose(harmless.log_probs, plain.log_probs, atol=1e-5)
    assert runs.difference(harmless.gradients, plain.gradients) < 1e-4
    other = outcome({"softmax_scale": 1.0})
    assert np.abs(other.log_probs - plain.log_probs).max() > 1e-3
    assert runs.difference(other.gradients, plain.gradients) > 1e-2
