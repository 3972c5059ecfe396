"""Fixtures that whole runs share: a task, and a running Ray for those that do not test Ray itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.runs import JOINED, Task, shared_directory, shared_task
from tests.cluster.shared_ray import joined


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return shared_task(tmp_path_factory)


@pytest.fixture(scope="session")
def ray_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with joined(shared_directory(tmp_path_factory)) as variables:
        yield variables


@pytest.fixture(scope="module")
def joined_ray(ray_variables: dict[str, str]) -> Iterator[None]:
    """Let the runs of this module join the Ray that runs already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_variables.items():
            patch.setenv(JOINED + name, value)
        yield
