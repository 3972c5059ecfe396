"""Micro-batches are packed one ahead of the model: in order, and never more than two at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import tiny
import torch
from runs import Outcome
from worker_pool import WorkerPool

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.microbatch import MicroBatch, pack_rows
from slime.megatron.packs import Packs
from slime.megatron.trainer import Trainer

BATCH = tiny.random_batch(8)
ARCH = tiny.make_args


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3")
