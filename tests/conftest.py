"""Fixtures that several folders share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes of the pool: many ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from worker_pool import WorkerPool

gc.disable()  # until all test modules are imported

ROOT = Path(__file__).parent
settings.register_profile("slime", deadline=None)
settings.load_profile("slime")
"""No example has a time limit: on a loaded machine one that takes 1 ms may take 300."""
settings.register_profile("many", deadline=None, max_examples=1000)
"""pytest --hypothesis-profile=many: ten times as many examples where a test does not say how many."""


LONGEST = (
    "cluster/test_faults.py",
    "config/test_memory.py",
    "cluster/test_resume.py",
    "cluster/test_async.py",
    "kill/test_kill_sweep.py",
    "cluster/test_life_and_death.py",
    "cluster/test_best_of_a_run.py",
    "cluster/test_colocation.py",
    "examples/test_minimal.py",
    "bench/test_benchmarks.py",
)
"""Files of minutes, which begin first: one that began last would leave all other processes without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files stay whole, and in their order but for the longest ones."""
    assert [name for name in LONGEST if not (ROOT / name).exists()] == [], "renamed"
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now lives as long as the process
    gc.enable()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()
