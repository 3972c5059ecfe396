"""Ray's processes are in sessions of their own, out of reach of signals to the driver's process group."""

from __future__ import annotations

import os
import subprocess

from slime.cluster.on_ray.own_session import children_in_own_sessions


def test_children_get_sessions_of_their_own() -> None:
    def session_of_a_child() -> int:
        # Like Ray, with a preexec_fn.
        with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None) as child:
            try:
                return os.getsid(child.pid)
            finally:
                child.kill()

    own = os.getsid(0)
    with children_in_own_sessions():
        assert session_of_a_child() != own
    assert session_of_a_child() == own, "control"
