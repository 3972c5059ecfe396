"""Fixtures that whole runs share: a task, and a running Ray for those that do not test Ray itself."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest

from slime.cluster.local_ray import AUTH_MODE, AUTH_TOKEN, LOOPBACK_ALONE
from tests.cluster.runs import JOINED, Task, environment, shared_task

HEAD = """
import logging, os, ray, sys
ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=200 * 1024**2, _node_ip_address="127.0.0.1")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return shared_task(tmp_path_factory)


@pytest.fixture(scope="session")
def ray_variables() -> Iterator[dict[str, str]]:
    """Start a Ray for many runs in turn, because a start takes as long as a short run; return how to join it."""
    variables = {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32), LOOPBACK_ALONE: "0"}
    env = {**environment(), **variables}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HEAD], env=env, stdin=pipe, stdout=pipe, text=True) as head:
        assert head.stdin is not None and head.stdout is not None
        address = head.stdout.readline().strip()
        assert address, "Ray did not start"
        yield {**variables, "RAY_ADDRESS": address}
        head.stdin.close()
        assert head.wait(60) == 0


@pytest.fixture(scope="module")
def joined_ray(ray_variables: dict[str, str]) -> Iterator[None]:
    """Let the runs of this module join the Ray that runs already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_variables.items():
            patch.setenv(JOINED + name, value)
        yield
