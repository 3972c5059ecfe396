"""Sample: one prompt and, once generated, one response to it.

- Where it goes: the data buffer makes groups of Samples, generation fills in tokens, rewards fill in `reward`, and
  `core.batch` turns the kept ones into training columns.
- Invariant: every per-token field that is present (see `core.columns.PER_TOKEN`) has exactly `response_length` entries,
  and `tokens` holds the prompt followed by the response, as the engine produced them (never tokenized again).
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from slime.core.columns import PER_TOKEN


class Status(StrEnum):
    """The state of a sample. FAILED: its generation or its reward failed; it takes no part in training."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


Message = dict[str, Any]

MULTI_TURN = "multi_turn"
"""The key of sample.metadata under which `rollout.multi_turn` keeps what it knows of a response of several turns."""


@dataclass
class Sample:
    """One sample on its way from prompt to training row. Lengths are counted in tokens.

    Example: a prompt of two tokens, and a response of three tokens whose second one was written by a tool. The policy
    did not sample the tool's token, so its mask is 0.

    >>> sample = Sample(
    ...     group_index=0,
    ...     index=5,
    ...     tokens=[11, 12, 21, 99, 22],
    ...     prompt_length=2,
    ...     response_length=3,
    ...     loss_mask=[1, 0, 1],
    ...     rollout_log_probs=[-0.5, 0.0, -1.25],
    ...     policy_versions=[3, 3, 4],
    ...     reward=1.0,
    ...     status=Status.COMPLETED,
    ... )
    >>> sample.check()
    >>> sample.prompt_tokens
    [11, 12]
    >>> sample.reward_value()
    1.0
    >>> sample.to_bare_prompt().tokens
    [11, 12]
    >>> sample.loss_mask = [1, 0]
    >>> sample.check()
    Traceback (most recent call last):
    ValueError: sample 5: loss_mask has 2 entries for 3 response tokens
    """

    group_index: int = -1
    """The number of the prompt in order of consumption, over all epochs; samples of one prompt share it."""
    index: int = -1
    """The number of this sample, over the whole run."""
    prompt: str | list[Message] = ""
    """The text, or the OpenAI messages under --apply-chat-template, with the system prompt."""
    label: str | None = None
    tokens: list[int] = field(default_factory=list[int])
    """The prompt's tokens, then the response's tokens."""
    prompt_length: int = 0
    response: str = ""
    response_length: int = 0
    loss_mask: list[int] | list[float] | None = None
    """0 or 1 for each response token; None means all ones. SFT may have other weights."""
    rollout_log_probs: list[float] | None = None
    """The engine's log-prob of each response token under softmax(logits / temperature)."""
    policy_versions: list[int] | None = None
    """The policy version that sampled each response token."""
    routed_experts: NDArray[np.int32] | None = field(default=None, compare=False)
    """The experts that each token went to: int32 [tokens of prompt and response but the last, MoE layers, topk].

    Copies share the array, so it is never changed in place. It is shorter when the engine has not processed the last
    tokens (those of a tool, after the last call).
    """
    reward: float | dict[str, Any] | None = None
    """None until the reward is computed; stays None if it failed (see `reward_failure`).

    A dict holds the number that training uses under --reward-key, and whatever else the reward function returned as
    plain data.
    """
    reward_failure: str | None = None
    """Why there is no reward: 'timeout', 'crash', 'not a number', ..."""
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """The object under --metadata-key, and `start_rollout_id`: the rollout in which the group's generation began."""
    row: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """Every column of the data line, as it was read. The samples of a prompt share it, so it is never changed."""

    @property
    def prompt_tokens(self) -> list[int]:
        """The tokens of the prompt alone."""
        return self.tokens[: self.prompt_length]

    @property
    def num_sampled(self) -> int:
        """The number of response tokens that a policy sampled.

        Tokens of an environment have loss_mask 0 and log-prob 0. A sampled token that a hook has masked keeps its
        log-prob and counts, or a response that continues would get longer than --rollout-max-response-len.
        """
        if self.loss_mask is None:
            return self.response_length
        log_probs = self.rollout_log_probs or [0.0] * self.response_length
        return sum(bool(weight or log_prob) for weight, log_prob in zip(self.loss_mask, log_probs, strict=True))

    @property
    def is_finished(self) -> bool:
        """Whether the response is complete, with or without a reward."""
        return self.status in (Status.COMPLETED, Status.TRUNCATED)

    def copy(self) -> Self:
        """Return a copy that shares nothing that is changed in place."""
        copied = copy.copy(self)
        for name in ("tokens", *PER_TOKEN):
            values = getattr(self, name)
            setattr(copied, name, None if values is None else list(values))
        copied.reward = copy.deepcopy(self.reward)
        copied.metadata = copy.deepcopy(self.metadata)
        return copied

    def check(self) -> None:
        """Check that per-token fields and the response agree in length.

        Raises:
            ValueError: a length is wrong; the message names the sample, the field and both lengths.
        """
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
                f"sample {self.index}: routed_experts has shape {list(routes.shape)} for {len(self.tokens)} tokens; "
                "it must be [tokens, layers, topk], for at most all tokens but the last"
            )

    def reward_value(self, key: str | None = None) -> float:
        """Return the scalar reward; for a reward that is a dict, its entry `key`.

        Raises:
            ValueError: there is no reward, no such entry, or it is not a number.
        """
        reward: Any = self.reward
        if isinstance(reward, dict):
            entries = cast(dict[str, Any], reward)
            if key is None or key not in entries:
                names = ", ".join([repr(name)[:40] for name in entries][:10]) + (" ..." if len(entries) > 10 else "")
                given = "is not given" if key is None else f"is {key!r}"
                raise ValueError(
                    f"sample {self.index}: its reward is a dict with the keys {names}, and --reward-key {given}; "
                    "it must name the entry that training uses"
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
            raise ValueError(f"sample {self.index}: {where} is {repr(reward)[:80]}, which is not a number") from error

    def to_bare_prompt(self) -> Sample:
        """Return the prompt without anything that was generated, for the data buffer."""
        metadata = {k: v for k, v in self.metadata.items() if k not in ("start_rollout_id", MULTI_TURN)}
        return Sample(
            group_index=self.group_index,
            index=self.index,
            prompt=self.prompt,
            label=self.label,
            tokens=self.prompt_tokens,
            prompt_length=self.prompt_length,
            metadata=metadata,
            row=self.row,
        )

    def to_failed(self, failure: str) -> Sample:
        """Return the sample without a response: it keeps its row and takes no part in training."""
        failed = self.to_bare_prompt()
        failed.metadata = self.metadata
        failed.status = Status.FAILED
        failed.reward_failure = failure
        return failed

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` undoes it."""
        values = {f.name: copy.copy(getattr(self, f.name)) for f in fields(self)} | {
            "reward": copy.deepcopy(self.reward)
        }
        return {**values, "status": self.status.value, "routed_experts": _packed(self.routed_experts)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Undo `to_dict`.

        Raises:
            ValueError: a key is not a field of Sample.
        """
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"these keys are not fields of Sample: {sorted(unknown)}")
        sample = cls(**data)
        sample.status = Status(sample.status)
        sample.routed_experts = _unpacked(data.get("routed_experts"))
        return sample


def _packed(routes: NDArray[np.int32] | None) -> dict[str, Any] | None:
    """Return shape and base64 bytes; as lists of numbers the routes would be most of a file."""
    if routes is None:
        return None
    raw = np.ascontiguousarray(routes, dtype="<i4").tobytes()
    return {"shape": list(routes.shape), "int32": base64.b64encode(raw).decode("ascii")}


def _unpacked(packed: dict[str, Any] | None) -> NDArray[np.int32] | None:
    if packed is None:
        return None
    return np.frombuffer(base64.b64decode(packed["int32"]), dtype="<i4").reshape(packed["shape"])
