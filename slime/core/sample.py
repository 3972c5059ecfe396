"""Sample: one prompt and, once generated, one response to it.

Path: the data buffer makes groups of Samples, generation fills in tokens, rewards fill in `reward`,
and `core.batch` turns the kept ones into training columns. Invariant: every per-token field that is
present (`rollout_log_probs`, `policy_versions`, `loss_mask`) has exactly `response_length` entries, and
`tokens` holds the prompt followed by the response, as the engine produced them (never re-tokenised).
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray


class Status(StrEnum):
    """Where a sample stands. FAILED: its generation or its reward failed; it takes no part in training."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


Message = dict[str, Any]

PER_TOKEN = ("loss_mask", "rollout_log_probs", "policy_versions")
"""Fields of Sample with one entry a response token, where they are there."""


@dataclass
class Sample:
    """One sample on its way from prompt to training row. Lengths are counted in tokens."""

    group_index: int = -1
    """The prompt's number in order of consumption, over all epochs; samples of one prompt share it."""
    index: int = -1
    """The sample's own number, over the whole run."""
    prompt: str | list[Message] = ""
    """The text, or the OpenAI messages, as the data file has them."""
    label: str | None = None
    tokens: list[int] = field(default_factory=list[int])
    """Prompt tokens, then response tokens."""
    prompt_length: int = 0
    response: str = ""
    response_length: int = 0
    loss_mask: list[int] | None = None
    """One 0 or 1 a response token; None means all ones."""
    rollout_log_probs: list[float] | None = None
    """The engine's log-prob of each response token under softmax(logits / temperature)."""
    policy_versions: list[int] | None = None
    """The policy version that made each response token."""
    routed_experts: NDArray[np.int32] | None = field(default=None, compare=False)
    """To which experts the first tokens went, prompt and response [all tokens but the last, layers with experts, topk].

    Never changed in place: copies share it. Tokens that no engine has run since they were written (a tool's, behind
    its call) are missing at the end.
    """
    reward: float | dict[str, Any] | None = None
    """None until judged; stays None where the reward failed (see `reward_failure`).

    A dict has the number that is trained on under --reward-key, and whatever else the reward function returned as
    plain data.
    """
    reward_failure: str | None = None
    """Why there is no reward: 'timeout', 'crash', 'not a number', ..."""
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """The data line's metadata, and `start_rollout_id`: the rollout in which the group's generation began."""

    @property
    def prompt_tokens(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def is_finished(self) -> bool:
        """Whether the response is whole, judged or not."""
        return self.status in (Status.COMPLETED, Status.TRUNCATED)

    def copy(self) -> Self:
        """The same values, with nothing in common that is changed in place."""
        copied = copy.copy(self)
        for name in ("tokens", *PER_TOKEN):
            values = getattr(self, name)
            setattr(copied, name, None if values is None else list(values))
        copied.reward = copy.deepcopy(self.reward)
        copied.metadata = copy.deepcopy(self.metadata)
        return copied

    def check(self) -> None:
        """Raise ValueError where a per-token field and the response disagree in length."""
        if len(self.tokens) != self.prompt_length + self.response_length:
            raise ValueError(
                f"sample {self.index}: {len(self.tokens)} tokens, but prompt_length {self.prompt_length} "
                f"+ response_length {self.response_length}"
            )
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != self.response_length:
                raise ValueError(
                    f"sample {self.index}: {name} has {len(values)} entries for {self.response_length} response tokens"
                )
        routes = self.routed_experts
        if routes is not None and (routes.ndim != 3 or len(routes) >= max(len(self.tokens), 1)):
            raise ValueError(
                f"sample {self.index}: routed_experts is {list(routes.shape)} for {len(self.tokens)} tokens; it has to "
                "be [tokens, layers, topk] of at most all of them but the last"
            )

    def reward_value(self, key: str | None = None) -> float:
        """The scalar reward; of a dict-valued reward, the entry `key`.

        Raises:
            ValueError: there is no reward, no such entry, or it is no number.
        """
        reward: Any = self.reward
        if isinstance(reward, dict):
            entries = cast(dict[str, Any], reward)
            if key is None or key not in entries:
                names = ", ".join([repr(name)[:40] for name in entries][:10]) + (" ..." if len(entries) > 10 else "")
                given = "is not given" if key is None else f"is {key!r}"
                raise ValueError(
                    f"sample {self.index}: its reward is a dict with the keys {names}, and --reward-key {given}; "
                    "it has to name the one that is trained on"
                )
            reward = entries[key]
        if reward is None:
            raise ValueError(f"sample {self.index} has no reward ({self.reward_failure or 'not judged yet'})")
        try:
            if isinstance(reward, str):
                raise TypeError("text")
            return float(reward)
        except (TypeError, ValueError) as error:
            where = "its reward" if key is None else f"the entry {key!r} of its reward (--reward-key)"
            raise ValueError(f"sample {self.index}: {where} is {repr(reward)[:80]}, which is no number") from error

    def to_bare_prompt(self) -> Sample:
        """The same prompt with everything generated taken off (for the data buffer)."""
        metadata = {k: v for k, v in self.metadata.items() if k != "start_rollout_id"}
        return Sample(
            group_index=self.group_index,
            index=self.index,
            prompt=self.prompt,
            label=self.label,
            tokens=self.prompt_tokens,
            prompt_length=self.prompt_length,
            metadata=metadata,
        )

    def to_failed(self, failure: str) -> Sample:
        """The sample as one without a response: it keeps its row, and takes no part in training."""
        failed = self.to_bare_prompt()
        failed.metadata = self.metadata
        failed.status = Status.FAILED
        failed.reward_failure = failure
        return failed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the way back."""
        values = {f.name: copy.copy(getattr(self, f.name)) for f in fields(self)} | {
            "reward": copy.deepcopy(self.reward)
        }
        return {**values, "status": self.status.value, "routed_experts": _packed(self.routed_experts)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"not fields of Sample: {sorted(unknown)}")
        sample = cls(**data)
        sample.status = Status(sample.status)
        sample.routed_experts = _unpacked(data.get("routed_experts"))
        return sample


def _packed(routes: NDArray[np.int32] | None) -> dict[str, Any] | None:
    """Shape and bytes: as lists they would be most of a file."""
    if routes is None:
        return None
    raw = np.ascontiguousarray(routes, dtype="<i4").tobytes()
    return {"shape": list(routes.shape), "int32": base64.b64encode(raw).decode("ascii")}


def _unpacked(packed: dict[str, Any] | None) -> NDArray[np.int32] | None:
    if packed is None:
        return None
    return np.frombuffer(base64.b64decode(packed["int32"]), dtype="<i4").reshape(packed["shape"])
