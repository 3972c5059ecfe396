"""How long saving a checkpoint stops training, compared with a plain copy of the same bytes.

    python -m bench.checkpoint        (make bench-checkpoint)

One rank on a CPU takes training steps and saves weights and optimizer. A save stops it for the copy of the state
(`blocked`); the files are written while the next steps run (`whole`). Each round also copies as many bytes from one
block of memory to another, and writes as many to a file. Invariant: what is loaded equals what was saved.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import OUTPUTS, Goal, Spread, Table, machine, ratios, write_result

BLOCKED, COPY, WHOLE, WRITE = "blocked: the save stops training", "plain copy", "whole save", "plain write"
ALONE, DURING = "a step alone", "a step while a checkpoint is written"
PARTS = (BLOCKED, COPY, WHOLE, WRITE, ALONE, DURING)
GOAL = 1 / 1.25
"""A save stops training for at most 1.25 times the plain copy."""
VOCAB, ROWS, LENGTH = 8192, 4, 64


def trainer_of(save: Path, store: Path, layers: int) -> Any:
    """Return a trainer of a model with random weights."""
    from slime.config.args import Args
    from slime.core.architecture import Architecture
    from slime.megatron.trainer import Trainer

    arch = Architecture(
        family="qwen3",
        num_layers=layers,
        hidden_size=768,
        ffn_hidden_size=2304,
        num_attention_heads=12,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        norm_epsilon=1e-6,
        rotary_base=1e4,
        qk_layernorm=True,
    )
    args = Args(
        architecture=arch,
        save=str(save),
        num_rollout=1000,
        num_steps_per_rollout=1,
        rollout_batch_size=1,
        n_samples_per_prompt=ROWS,
        bf16=False,
        lr=1e-5,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=ROWS * LENGTH,
        log_probs_chunk_size=1024,
        calculate_per_token_loss=True,
    )
    return Trainer(args, rank=0, world_size=1, init_method=f"file://{store}")


def batch() -> Any:
    from slime.core.batch import TrainBatch

    rng, responses = np.random.default_rng(0), np.full(ROWS, LENGTH - 1)
    return TrainBatch(
        np.full(ROWS, LENGTH),
        responses,
        {
            "tokens": rng.integers(0, VOCAB, ROWS * LENGTH),
            "loss_mask": np.ones(int(responses.sum()), dtype=np.float32),
            "rewards": np.arange(ROWS, dtype=np.float32),
            "group_indices": np.zeros(ROWS, dtype=np.int64),
            "sample_indices": np.arange(ROWS),
        },
    )


def state_of(trainer: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a checkpoint brings back."""
    from slime.megatron.model.build import all_weights
    from slime.megatron.optim.optimizer_state import parts_of

    yield from all_weights(trainer.model)
    for part in parts_of(trainer.optimizer):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                yield from (value for _, value in sorted(part.optimizer.state[weight].items()))


def check_load(trainer: Any, path: Path, saved: list[torch.Tensor]) -> None:
    """Load the checkpoint, and compare every tensor with what was saved."""
    from slime.megatron.checkpoint.files import find_checkpoint
    from slime.megatron.checkpoint.save_load import load_checkpoint

    found = find_checkpoint(path)
    assert found is not None
    load_checkpoint(found, model=trainer.model, optimizer=trainer.optimizer, scheduler=trainer.scheduler)
    if not all(torch.equal(ours, then) for ours, then in zip(state_of(trainer), saved, strict=True)):
        raise RuntimeError("the loaded state differs from the saved one")


class Rounds:
    """The measurements: a save with steps meanwhile, a plain copy, a plain write."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self._trainer, self._folder, self._batch = trainer, folder, batch()
        self._number = 0
        self.found: dict[str, list[float]] = {part: [] for part in PARTS}
        self._step()
        self.size = sum(tensor.nbytes for tensor in state_of(trainer))
        self._from = torch.ones(self.size, dtype=torch.uint8)
        self._to = torch.zeros(self.size, dtype=torch.uint8)

    def _step(self) -> float:
        start = time.perf_counter()
        self._trainer.train(self._number, self._batch)
        return time.perf_counter() - start

    def _timed(self, work: Any) -> float:
        gc.collect()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _write(self) -> None:
        with (self._folder / "plain").open("wb") as file:
            file.write(memoryview(self._from.numpy()))  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())

    def turn(self, *, counts: bool) -> None:
        """Measure everything once; the first turn allocates memory and does not count."""
        self._number += 1
        now = {ALONE: min(self._step() for _ in range(3))}
        now[BLOCKED] = self._timed(lambda: self._trainer.begin_save(self._number, {}))
        meanwhile: list[float] = []
        while self._trainer.saver.is_busy:
            meanwhile.append(self._step())
        written = self._trainer.saver.finish()
        now |= {WHOLE: written.seconds, DURING: min(meanwhile or [now[ALONE]])}
        now[COPY] = self._timed(lambda: self._to.copy_(self._from))
        now[WRITE] = self._timed(self._write)
        shutil.rmtree(written.path)
        if counts:
            for part, seconds in now.items():
                self.found[part].append(seconds)

    def last(self) -> None:
        """Save once more, take a step, load, and compare."""
        saved = [tensor.detach().clone() for tensor in state_of(self._trainer)]
        self._trainer.begin_save(self._number + 1, {})
        self._step()
        check_load(self._trainer, self._trainer.saver.finish().path, saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "checkpoint.json")
    given = parser.parse_args()
    facts = machine()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUTS) as directory:
        folder = Path(directory)
        rounds = Rounds(trainer_of(folder / "save", folder / "store", given.layers), folder)
        for turn in range(given.rounds + 1):
            rounds.turn(counts=turn > 0)
        rounds.last()
    found = rounds.found
    note = (
        f"Weights and AdamW's moments, {rounds.size / 1e9:.2f} GB in fp32, one rank. Medians, with lowest and highest."
    )
    table = Table("Saving a checkpoint", ["part", "seconds", "GB/s"], note=note)
    for part in PARTS:
        spread = Spread.of(found[part])
        speed = f"{rounds.size / spread.median / 1e9:.2f}" if part not in (ALONE, DURING) else ""
        table.rows.append([part, spread.show(3), speed])
    goal = Goal("plain copy / blocked", ratios(found[COPY], found[BLOCKED]).median, GOAL)
    write_result(given.out, [table], [goal], facts, found)


if __name__ == "__main__":
    main()
