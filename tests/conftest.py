"""Fixtures that several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes of the pool: many ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from worker_pool import WorkerPool

settings.register_profile("slime", deadline=None)
settings.load_profile("slime")
"""No example has a time limit: on a loaded machine one that takes 1 ms may take 300."""
settings.register_profile("many", deadline=None, max_examples=1000)
"""pytest --hypothesis-profile=many: ten times as many examples where a test does not say how many."""


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()
