"""The vocabulary's padding in a real trainer: it has no probability, gets no gradient and stays zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.megatron.model.build import named_parameters
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


class Padding(NamedTuple):
    rows: int
    """The number of padding rows in all tables of this rank."""
    after_training: int
    """Padding entries that are not zero: in the weights, and in the last step's gradients."""
    gradients: int
    log_probs: np.ndarray
    """Log-probs as trained; with the padding filled with large numbers; with the last real token's row filled so."""
    log_probs_with_garbage: np.ndarray
    log_probs_with_a_wrong_row: np.ndarray


def _padding(rank: int, world_size: int, init_method: str, args: Args) -> Padding:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        batch = tiny.random_batch()
        for number in range(2):
            trainer.train(number, batch)
        tables: list[Any] = [parameter for name, parameter in named_parameters(trainer.model) if name in TABLES]
        first = max(tiny.VOCAB - trainer.topology.tp_rank * len(tables[0]), 0)
        paddings = [table.detach()[first:] for table in tables]
        weights = sum(int(rows.count_nonzero()) for rows in paddings)
        gradients = sum(int(table.main_grad[first:].count_nonzero()) for table in tables)
        trained = trainer.log_probs(batch)
        with torch.no_grad():
            for rows in paddings:
                rows.fill_(100.0)
            garbage = trainer.log_probs(batch)
            if first > 0:
                tables[-1][first - 1] = 1.0
            wrong = trainer.log_probs(batch)
        return Padding(sum(len(rows) for rows in paddings), weights, gradients, trained, garbage, wrong)
    finally:
        trainer.close()


@pytest.mark.parametrize("family", ["glm4", "llama3"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_padding_never_has_an_effect(family: str, tp_size: int, workers: WorkerPool, tmp_path: Path) -> None:
    """glm4 has two tables, llama3 one for both ends. At TP 2 the second rank's part is padding only."""
    args = tiny.make_args(
        tiny.hf_dir(tmp_path, family),
        tensor_model_parallel_size=tp_size,
        sequence_parallel=tp_size > 1,
        weight_decay=0.1,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        entropy_coef=0.01,
    )
    ranks = workers.run(tp_size, _padding, args)
    num_tables = 2 if family == "glm4" else 1
    assert sum(found.rows for found in ranks) == (128 * tp_size - tiny.VOCAB) * num_tables
    for found in ranks:
        assert (found.after_training, found.gradients) == (0, 0)
        assert np.array_equal(found.log_probs_with_garbage, found.log_probs)
        # control: a change of one real token's row has an effect
        assert np.abs(found.log_probs_with_a_wrong_row - found.log_probs).max() > 1e-3
