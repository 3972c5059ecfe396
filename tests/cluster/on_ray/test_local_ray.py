"""The run's own Ray is protected; variables that the user has set for it stay."""

from __future__ import annotations

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slime.cluster.on_ray.local_ray import (
    ADDRESS,
    AUTH_MODE,
    AUTH_TOKEN,
    AUTH_TOKEN_PATH,
    LOOPBACK_ALONE,
    address_fault,
    protect_local_ray,
)
from slime.cluster.on_ray.placement import start_ray
from slime.config.args import Args
from slime.core.errors import RunError

VARIABLES = ("RAY_ADDRESS", LOOPBACK_ALONE, AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH)


def protected(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    """Return the variables after `protect_local_ray`, with `given` set before."""
    with monkeypatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, "")  # so that it is restored
            patch.delenv(name)
        for name, value in given.items():
            patch.setenv(name, value)
        protect_local_ray()
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("garbage", "no address of the form HOST:PORT"),
        ("127.0.0.1", "no address of the form HOST:PORT"),
        ("127.0.0.1:0", "no address of the form HOST:PORT"),
        ("127.0.0.1:99999", "no address of the form HOST:PORT"),
        ("::1:6379", "no address of the form HOST:PORT"),
        ("a b:6379", "no address of the form HOST:PORT"),
        ("ray://127.0.0.1:10001", "the address is for Ray Client"),
        ("http://127.0.0.1:8265", "the address is for `ray job submit`"),
    ],
)
def test_an_address_that_no_ray_has(address: str, message: str) -> None:
    fault = str(address_fault(address, within=0.1))
    assert fault.startswith(f"RAY_ADDRESS={address}: ")
    assert message in fault


def test_an_address_at_which_no_ray_listens() -> None:
    """One accepts and never answers, one is a web server, and one has ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "what listens there is no Ray" in str(address_fault(address, within=0.5))
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever).start()
        assert "what listens there is no Ray" in str(address_fault(f"127.0.0.1:{web.server_port}", within=5))
        web.shutdown()
    assert "no Ray answers there (Connection refused)" in str(address_fault(address, within=0.1))
    assert address_fault("auto") is address_fault("local") is None


def test_a_token_that_ray_requires(
    ray_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, token = ray_variables[ADDRESS], ray_variables[AUTH_TOKEN]
    for name in (AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "this Ray requires a token, and the run has none; set RAY_AUTH_MODE=token" in str(address_fault(address))
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("0" * 64)
    assert f"this Ray requires a token, and that of {file} is another" in str(address_fault(address))
    file.write_text(f"{token}\n")
    assert address_fault(address) is None
    monkeypatch.setenv(AUTH_TOKEN, "1" * 64)
    assert f"that of {AUTH_TOKEN} is another" in str(address_fault(address))
    monkeypatch.setenv(AUTH_TOKEN, token)
    assert address_fault(address) is None
    monkeypatch.setenv(AUTH_MODE, "disabled")
    assert "the run has none" in str(address_fault(address))


def test_a_ray_that_fails_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray raises a ValueError of several lines for it
    with pytest.raises(RunError, match=r"^Ray could not be started or joined: ") as caught:
        start_ray(Args())
    assert "\n" not in str(caught.value)
