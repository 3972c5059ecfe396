"""Membership: registers a run's engines at a router, and removes them from a router that outlives the run.

- Called by: the rollout manager joins its engines here, after they are ready and before anything is generated.
- Invariant: a run never shares a router with engines that are not its own, because a part of its generation would go to
  weights that nobody trains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime.config.args import Args
from slime.engine.keys import NO_KEYS, Keys
from slime.engine.protocol import RouterEndpoint
from slime.engine.server_process import ask, is_healthy

LABEL = "slime"
"""The label of this project's registrations, which distinguishes a killed run's entries from a user's."""

SOON_S = 10.0
"""Seconds within which a router notices that an engine is healthy."""


def external_router_url(args: Args) -> str | None:
    """Return the URL of --sglang-router-ip and --sglang-router-port; None if the run starts its own router."""
    host = args.sglang_router_ip
    if host is None:
        return None
    return f"http://{f'[{host}]' if ':' in host else host}:{args.sglang_router_port}"


@dataclass(frozen=True)
class Member:
    """One engine on the router's list."""

    id: str
    url: str
    is_healthy: bool
    metadata: Mapping[str, Any]

    def is_left_over(self) -> bool:
        """Return whether the engine died together with the run that had registered it."""
        return LABEL in self.metadata and not self.is_healthy and not is_healthy(self.url)


class Membership:
    """The engines of one run at the router `url`."""

    def __init__(self, url: str, *, keys: Keys = NO_KEYS, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._keys = keys
        self._timeout = timeout
        self._joined: list[str] = []

    def wait_ready(self) -> None:
        """Wait until the router answers.

        Raises:
            RuntimeError: it did not, within the timeout.
        """
        deadline = time.monotonic() + self._timeout
        while not is_healthy(self.url):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the router at {self.url} did not answer within {self._timeout:g} s: is it running there "
                    "(--sglang-router-ip, --sglang-router-port), and reachable from here?"
                )
            time.sleep(0.1)

    def refuse_others(self, own: Sequence[str]) -> None:
        """Remove what a killed run left, and check that only `own` are left.

        Raises:
            RuntimeError: naming the engines that belong to others.
        """
        foreign: list[Member] = []
        for member in self._members():
            if member.url in own:
                continue
            if member.is_left_over():
                self._remove(member)
            else:
                foreign.append(member)
        if foreign:
            listed = ", ".join(f"{member.url}{'' if member.is_healthy else ' (not healthy)'}" for member in foreign)
            raise RuntimeError(
                f"the router at {self.url} has engines that are not this run's: {listed}; a part of all generation "
                "would go to their weights. Name them with --rollout-external-engines, remove them "
                f"(DELETE {self.url}{RouterEndpoint.WORKERS}/<id>), or use another router"
            )

    def join(self, urls: Sequence[str]) -> None:
        """Add `urls` to the router's list, and wait until it finds them healthy.

        Raises:
            RuntimeError: the router has engines of others, refused one of these, or did not accept it in time.
        """
        self.refuse_others(urls)
        present = {member.url: member for member in self._members()}
        for url in urls:
            if url not in present:
                self._joined.append(url)
            elif LABEL in present[url].metadata:
                self._remove(present[url])  # a killed run's entry, which still has the key of that run
            self._register(url, self._timeout)

    def add(self, url: str) -> None:
        """Add one more engine of the run to the list; an entry that exists stays.

        Raises:
            OSError, RuntimeError: the router did not answer, or did not find the engine healthy soon.
        """
        if url not in self._joined:
            self._joined.append(url)
        self._register(url, SOON_S)

    def remove(self, url: str) -> None:
        """Remove an engine from the list, if it is there."""
        for member in self._members():
            if member.url == url:
                self._remove(member)

    def leave(self) -> None:
        """Remove the engines that `join` added."""
        for member in self._members():
            if member.url in self._joined:
                self._remove(member)
        self._joined.clear()

    def is_open(self) -> bool:
        """Return whether the router shows its list without a key; then it also accepts engines from anybody."""
        return ask(self.url, "GET")[0] == 200

    def _register(self, url: str, timeout: float) -> None:
        register_worker(self.url, url, keys=self._keys, timeout=timeout, labels={LABEL: "1"})

    def _members(self) -> list[Member]:
        status, answer = ask(self.url, "GET", api_key=self._keys.control)
        if status != 200 or "workers" not in answer:
            raise RuntimeError(f"the router at {self.url} did not list its engines {refusal(status, answer)}")
        return [Member(w["id"], w["url"], w["is_healthy"], w.get("metadata") or {}) for w in answer["workers"]]

    def _remove(self, member: Member) -> None:
        status, answer = ask(
            self.url, "DELETE", path=f"{RouterEndpoint.WORKERS}/{member.id}", api_key=self._keys.control
        )
        if status not in (200, 202, 404):
            raise RuntimeError(f"the router at {self.url} did not remove {member.url} {refusal(status, answer)}")
        deadline = time.monotonic() + self._timeout
        while any(other.id == member.id for other in self._members()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the router at {self.url} did not remove {member.url} in {self._timeout:g} s")
            time.sleep(0.02)


def register_worker(
    router_url: str,
    worker_url: str,
    *,
    keys: Keys = NO_KEYS,
    timeout: float = 60.0,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Add an engine to the router, with the engine's key, and wait until it is listed as healthy.

    Raises:
        RuntimeError: the router refused it, or did not list it within `timeout` seconds.
    """
    given = {"url": worker_url, "api_key": keys.engine, "labels": labels}
    body = {name: value for name, value in given.items() if value is not None}
    status, answer = ask(router_url, "POST", body, api_key=keys.control)
    if status not in (200, 202):
        raise RuntimeError(f"the router at {router_url} refused {worker_url} {refusal(status, answer)}")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        _, answer = ask(router_url, "GET", api_key=keys.control)
        if any(w["url"] == worker_url and w["is_healthy"] for w in answer.get("workers", [])):
            return
        time.sleep(0.05)
    raise RuntimeError(
        f"the router at {router_url} did not list {worker_url} as healthy within {timeout:g} s: {answer}"
    )


def refusal(status: int, answer: Mapping[str, Any]) -> str:
    """Return a router's refusal as an error message, with the remedy if it requires another key."""
    remedy = "; give the run an admin key of that router: --router-control-plane-api-keys ID:NAME:admin:KEY"
    return f"({status}): {answer.get('message') or answer}{remedy if status in (401, 403) else ''}"
