from __future__ import annotations

import pytest

from tests.cluster.runs import Task, make_task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))
