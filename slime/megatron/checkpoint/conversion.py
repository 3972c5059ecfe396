"""Conversion between an HF directory and a torch_dist checkpoint, in one process on the CPU.

- Used by: the two converters under tools/, which are the command lines of these functions.
- Invariant: no bit changes. The model has the storage dtype of the HF directory if that is bf16, otherwise fp32, which
  represents every other one exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from slime.config.args import Args
from slime.megatron.checkpoint.save_load import FoundCheckpoint, load_checkpoint, save_release
from slime.megatron.model.build import ModelChunks, architecture_of, build_model
from slime.megatron.model.hf_weights import load_hf_into, save_hf
from slime.megatron.parallel import close_parallel, init_parallel
from slime.models.hf_files import HFReader
from slime.observability.path_lock import PathLocks


@contextmanager
def _one_process_model(args: Args, reader: HFReader) -> Iterator[tuple[ModelChunks, Args]]:
    """Yield the whole model in this process; a torch_dist checkpoint does not depend on the run's parallel sizes."""
    args = replace(
        args,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        sequence_parallel=False,
        bf16=reader.dtypes() == {torch.bfloat16},
    )
    with tempfile.TemporaryDirectory() as folder:
        init_parallel(args, rank=0, world_size=1, init_method=f"file://{Path(folder) / 'rendezvous'}")
        try:
            yield build_model(args, wrap=False), args
        finally:
            close_parallel()


def hf_to_torch_dist(args: Args, hf_dir: str | Path, save_dir: str | Path) -> Path:
    """Write `<save_dir>/release` from the weights in `hf_dir`, and return that directory.

    Raises:
        ValueError: the weights are not this model's.
        RunError: a run writes to `save_dir`, or it cannot be written.
    """
    reader = HFReader(hf_dir)
    with PathLocks([Path(save_dir)]), _one_process_model(args, reader) as (model, args):
        load_hf_into(model, architecture_of(args), reader, args)
        return save_release(save_dir, model=model)


def torch_dist_to_hf(args: Args, found: FoundCheckpoint, origin_hf_dir: str | Path, output_dir: str | Path) -> None:
    """Write `output_dir` from a checkpoint's weights, with the dtypes and all other files of `origin_hf_dir`.

    Raises:
        ValueError: the weights are not this model's.
        RunError: a run writes to `output_dir`, or it cannot be written.
    """
    with PathLocks([], [Path(output_dir)]), _one_process_model(args, HFReader(origin_hf_dir)) as (model, args):
        load_checkpoint(found, model=model)
        save_hf(output_dir, model, architecture_of(args), origin_hf_dir)
