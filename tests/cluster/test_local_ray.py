"""A Ray of the run's own is protected; what the user has set for it stays."""

from __future__ import annotations

import os

import pytest

from slime.cluster.local_ray import AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH, LOOPBACK_ALONE, protect_local_ray

VARIABLES = ("RAY_ADDRESS", LOOPBACK_ALONE, AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH)


def protected(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    """The variables after `protect_local_ray`, with `given` set before."""
    with monkeypatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, "")  # so that it is restored
            patch.delenv(name)
        for name, value in given.items():
            patch.setenv(name, value)
        protect_local_ray()
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = protected(monkeypatch)
    assert (own[LOOPBACK_ALONE], own[AUTH_MODE], len(own[AUTH_TOKEN])) == ("0", "token", 64)
    assert own[AUTH_TOKEN] != protected(monkeypatch)[AUTH_TOKEN], "a token for each run"
    for given in (
        {"RAY_ADDRESS": "10.0.0.1:6379"},
        {LOOPBACK_ALONE: "1", AUTH_MODE: "disabled"},
        {LOOPBACK_ALONE: "1", AUTH_MODE: "token", AUTH_TOKEN: "mine"},
        {LOOPBACK_ALONE: "1", AUTH_MODE: "token", AUTH_TOKEN_PATH: "/my/token"},
    ):
        assert protected(monkeypatch, **given) == given
