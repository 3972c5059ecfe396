"""--spec: a user's own layer in a real training step, against the built-in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from runs import Outcome, difference
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.compat import cpu_layer
from slime.megatron.model.build import transformer_config
from slime.megatron.model.layers import layer_spec
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.hf_dir(root / family, family) for family in ("glm4", "llama3")}


def train(
    workers: WorkerPool, hf: Path, *spec: str, batch: TrainBatch | None = None, ranks: int = 1, lr: float = 1e-3
) -> Outcome:
    parallel = {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    args = tiny.make_args(hf, spec=spec, clip_grad=0.0, lr=lr, **parallel)
    return workers.run(ranks, runs.train, args, [batch or tiny.random_batch()])[0]


@pytest.mark.parametrize(
    ("family", "spec", "ranks"),
    [
        ("glm4", ("examples.custom_layer.lean_mlp", "layer_spec"), 2),
        ("llama3", ("examples.custom_layer.lean_mlp", "layer_spec"), 1),
        ("llama3", ("specs_for_tests", "megatrons"), 1),
        ("llama3", ("specs_for_tests", "own_core_attention"), 1),
    ],
)
def test_an_equal_layer_trains_like_the_builtin(
    family: str, spec: tuple[str, str], ranks: int, workers: WorkerPool, hf: dict[str, Path]
) -> None:
    """Megatron's core attention cannot attend within a pack and is replaced; a user's own applies the positions."""
    own, built_in = train(workers, hf[family], *spec, ranks=ranks), train(workers, hf[family], ranks=ranks)
    assert difference(own.gradients, built_in.gradients) <= 1e-6
    assert difference(own.weights, built_in.weights) <= 1e-6
    np.testing.assert_allclose(own.log_probs, built_in.log_probs, atol=1e-6)


def test_another_layer_shows_in_the_logprob_gap(workers: WorkerPool, hf: dict[str, Path]) -> None:
    """The engine's log-probs are those of the built-in layers, so another layer makes a gap."""
    batch = tiny.random_batch()
    still = train(workers, hf["glm4"], batch=batch, lr=0.0)
    batch = replace(batch, columns={**batch.columns, "rollout_log_probs": still.log_probs})
    built_in = train(workers, hf["glm4"], batch=batch)
    other = train(workers, hf["glm4"], "specs_for_tests", "clamped", batch=batch)
    assert built_in.metrics[0]["train/logprob_gap_max"] < 1e-5
    assert other.metrics[0]["train/logprob_gap_max"] > 1e-2
    assert difference(other.gradients, built_in.gradients) > 1e-2


def refusal(rank: int, world_size: int, init_method: str, args: Args) -> str:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
    except ValueError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def test_parameters_without_a_weight_rule_are_listed(workers: WorkerPool, hf: dict[str, Path]) -> None:
    [message] = workers.run(1, refusal, tiny.make_args(hf["glm4"], spec=("specs_for_tests", "scaled")))
    assert "without a rule: decoder.layers.0.mlp.scale, decoder.layers.1.mlp.scale" in message


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", r"--spec specs_for_tests nothing: it returned None; it has to return a ModuleSpec"),
        ("one_argument", r"--spec specs_for_tests\.one_argument: it cannot be called as \(args, config\)"),
        ("absent", r"--spec specs_for_tests\.absent: module specs_for_tests has no 'absent'"),
    ],
)
def test_a_spec_without_a_layer_is_refused(function: str, message: str, hf: dict[str, Path]) -> None:
    args = tiny.make_args(hf["glm4"], spec=("specs_for_tests", function))
    with cpu_layer.layer(), pytest.raises(ValueError, match=message):
        layer_spec(args, transformer_config(args))
