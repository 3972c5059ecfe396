"""One Ray for the runs of all of pytest's processes: a start takes as long as a short run, and its daemons never rest.

The process that first needs it starts this file as a program, which ends once nobody uses the Ray. Users hold a shared
lock on a file, which the kernel takes back from a process that dies.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import ray

from slime.cluster.on_ray.local_ray import AUTH_MODE, AUTH_TOKEN, LOOPBACK_ALONE
from tests.cluster.runs import environment, locked

RECORD, TURN, USERS = "shared-ray.json", "shared-ray.turn", "shared-ray.users"
LOOK_S = 1.0
"""Seconds between two looks whether anybody uses the Ray."""
QUIET = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
"""Ray's processes report nothing to a dashboard, because there is none."""


@contextmanager
def joined(directory: Path) -> Generator[dict[str, str]]:
    """Return the variables with which a run joins the Ray; `directory` is one that all of pytest's processes share."""
    with (directory / USERS).open("w") as users:
        with (directory / TURN).open("w") as turn, locked(turn):
            if not (directory / RECORD).exists():
                _start(directory)
            fcntl.flock(users, fcntl.LOCK_SH)
            variables = json.loads((directory / RECORD).read_text())
        yield variables


def _start(directory: Path) -> None:
    variables = {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32), LOOPBACK_ALONE: "0"}
    head = subprocess.Popen(
        [sys.executable, __file__, str(directory)],
        env={**environment(), **QUIET, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    with head.stdout:
        assert head.stdout.readline().strip() == "started", "Ray did not start"


def main(directory: Path) -> None:
    """Start the Ray, record how to join it, and end it once nobody has done so."""
    ray.init(
        address="local",
        num_cpus=24,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=400 * 1024**2,
        _node_ip_address="127.0.0.1",
    )
    variables = {name: os.environ[name] for name in (AUTH_MODE, AUTH_TOKEN, LOOPBACK_ALONE)}
    variables["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    (directory / RECORD).write_text(json.dumps(variables))
    with (directory / TURN).open("w") as turn, (directory / USERS).open("w") as users:
        print("started", flush=True)
        while (directory / RECORD).exists():
            time.sleep(LOOK_S)
            with locked(turn):
                if not _used(users):
                    (directory / RECORD).unlink()


def _used(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]))
