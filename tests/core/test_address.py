"""A service that only this machine uses stays on loopback."""

from __future__ import annotations

import socket

import pytest

from slime.core.address import address_for, is_loopback, own_address


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_address_depends_on_who_connects() -> None:
    assert own_address("localhost") == "127.0.0.1"
    assert address_for(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.77", 9))
        except OSError:
            pytest.skip("this machine has no route to another")
        expected = probe.getsockname()[0]
    assert expected != "127.0.0.1"
    assert address_for(["http://127.0.0.1:1", "http://192.0.2.77:2"]) == expected
