"""Fixtures that several folders share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# This must come before torch is imported, here and in the pool's processes: many ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from worker_pool import WorkerPool

gc.disable()  # until all test modules are imported

ROOT = Path(__file__).parent
settings.register_profile("slime", deadline=None)
settings.load_profile("slime")
"""Examples have no time limit, because one that takes 1 ms may take 300 ms on a loaded machine."""
settings.register_profile("many", deadline=None, max_examples=1000)
"""pytest --hypothesis-profile=many: ten times as many examples, unless a test sets the number."""


LONGEST = (
    "cluster/test_faults.py",
    "config/test_memory.py",
    "cluster/test_resume.py",
    "cluster/test_async.py",
    "kill/test_kill_sweep.py",
    "cluster/test_life_and_death.py",
    "cluster/test_best_of_a_run.py",
    "examples/test_minimal.py",
    "bench/test_benchmarks.py",
)
"""The longest files, which begin first: one that began last would leave the other processes without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front; keep each file's tests together and all else in order."""
    assert [name for name in LONGEST if not (ROOT / name).exists()] == [], "renamed"
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # everything that is imported by now lives as long as the process
    gc.enable()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()
