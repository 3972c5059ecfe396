"""Sample: one prompt and, once generated, one response to it.

- Where it goes: the data buffer makes groups of Samples, generation fills in tokens, rewards fill in `reward`, and
  `core.batch` turns the kept ones into training columns.
- Invariant: every per-token field that is present (see `core.columns.PER_TOKEN`) has exactly `response_length` entries,
  and `tokens` holds the prompt followed by the response, as the engine produced them (never tokenized again).

`tokens` and the per-token fields are list fields (see `core.list_fields`): stored as arrays as long as nobody reads
them, and lists for everyone who does. Code that handles every sample of a rollout uses `array` and `set_arrays`.
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from slime.core.columns import COLUMNS, PER_TOKEN, Array
from slime.core.list_fields import array_of, keep_as_arrays, list_of, set_array, stored


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
    routed_experts: NDArray[np.signedinteger[Any]] | None = field(default=None, compare=False)
    """The experts that each token went to: [tokens of prompt and response but the last, MoE layers, topk].

    The dtype is int8 if that holds every expert's number, else int16 (`core.columns.routes_dtype`). Copies share the
    array, so it is never changed in place. It is shorter when the engine has not processed the last tokens (those of a
    tool, after the last call).
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
        tokens = stored(self, "tokens")[: self.prompt_length]
        return tokens.tolist() if isinstance(tokens, np.ndarray) else tokens

    @property
    def num_tokens(self) -> int:
        """The number of tokens of prompt and response together."""
        return len(stored(self, "tokens"))

    def array(self, name: str) -> Array | None:
        """Return `tokens` or a per-token field as an array, without making a list; None if the field is None.

        Nobody may change the array. Masks are int8 as generated and float64 as a user's list, log-probs are float64,
        tokens and policy versions int32.

        Raises:
            ValueError: a user's list has an entry that is no number, or no whole number for a token or a version.
        """
        try:
            return array_of(self, name)
        except ValueError as error:
            raise ValueError(f"sample {self.index}: {error}") from error

    @property
    def tokens_T(self) -> Array:
        """The tokens of prompt and response as an array, which nobody may change."""
        tokens = self.array("tokens")
        assert tokens is not None, "tokens are never None"
        return tokens

    @property
    def response_tokens_R(self) -> Array:
        """The tokens of the response alone as an array, which nobody may change."""
        return self.tokens_T[self.prompt_length :]

    def set_text(self, text: str) -> None:
        """Set the response to the text of its tokens, and remember that it is this text of these tokens."""
        self.response = text
        vars(self)["_text_of"] = (text, stored(self, "tokens"))

    def known_text(self) -> str | None:
        """Return the text of the response's tokens as `set_text` got it; None if text or tokens may have changed."""
        text, tokens = vars(self).get("_text_of", (None, None))
        is_same = text is self.response and tokens is stored(self, "tokens") and isinstance(tokens, np.ndarray)
        return text if is_same else None

    def set_arrays(self, **arrays: Array | None) -> None:
        """Set `tokens` or per-token fields to arrays that nobody changes from now on."""
        for name, values in arrays.items():
            set_array(self, name, values)

    @property
    def num_sampled(self) -> int:
        """The number of response tokens that a policy sampled.

        Tokens of an environment have loss_mask 0 and log-prob 0. A sampled token that a hook has masked keeps its
        log-prob and counts, or a response that continues would get longer than --rollout-max-response-len.
        """
        mask_R, log_probs_R = self.array("loss_mask"), self.array("rollout_log_probs")
        if mask_R is None:
            return self.response_length
        sampled_R = mask_R != 0
        if log_probs_R is not None and len(log_probs_R):
            sampled_R |= log_probs_R != 0
        return int(np.count_nonzero(sampled_R))

    @property
    def is_finished(self) -> bool:
        """Whether the response is complete, with or without a reward."""
        return self.status in (Status.COMPLETED, Status.TRUNCATED)

    def copy(self) -> Self:
        """Return a copy that shares nothing that is changed in place."""
        copied = copy.copy(self)
        for name in LIST_FIELDS:
            values = stored(self, name)  # an array is never changed in place
            vars(copied)[name] = values if values is None or isinstance(values, np.ndarray) else list(values)
        copied.reward = copy.deepcopy(self.reward)
        copied.metadata = copy.deepcopy(self.metadata)
        return copied

    def check(self) -> None:
        """Check that per-token fields and the response agree in length.

        Raises:
            ValueError: a length is wrong; the message names the sample, the field and both lengths.
        """
        if self.num_tokens != self.prompt_length + self.response_length:
            raise ValueError(
                f"sample {self.index}: {self.num_tokens} tokens, but prompt_length {self.prompt_length} "
                f"+ response_length {self.response_length}"
            )
        for name in PER_TOKEN:
            values = stored(self, name)
            if values is not None and len(values) != self.response_length:
                raise ValueError(
                    f"sample {self.index}: {name} has {len(values)} entries for {self.response_length} response tokens"
                )
        routes = self.routed_experts
        if routes is not None and (routes.ndim != 3 or len(routes) >= max(self.num_tokens, 1)):
            raise ValueError(
                f"sample {self.index}: routed_experts has shape {list(routes.shape)} for {self.num_tokens} tokens; "
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

    def to_graded_text(self) -> Self:
        """Return a shallow copy without anything that has an entry for each token, for graders of the text alone.

        It keeps both lengths, so it does not pass `check`.
        """
        copied = copy.copy(self)
        vars(copied).pop("_text_of", None)
        copied.set_arrays(tokens=np.zeros(0, dtype=np.int32), **dict.fromkeys(PER_TOKEN))
        copied.routed_experts = None
        return copied

    def to_failed(self, failure: str) -> Sample:
        """Return the sample without a response: it keeps its row and takes no part in training."""
        failed = self.to_bare_prompt()
        failed.metadata = self.metadata
        failed.status = Status.FAILED
        failed.reward_failure = failure
        return failed

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` undoes it."""
        values = {
            f.name: list_of(self, f.name) if f.name in LIST_FIELDS else copy.copy(getattr(self, f.name))
            for f in fields(self)
        }
        values["reward"] = copy.deepcopy(self.reward)
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


_IS_WHOLE = {column.sample_field: np.dtype(column.dtype).kind in "iu" for column in COLUMNS.values()}
LIST_FIELDS = ("tokens", *PER_TOKEN)
"""The fields that are stored as arrays and read as lists."""
keep_as_arrays(Sample, {name: "int32" if _IS_WHOLE[name] else "float64" for name in LIST_FIELDS})


def _packed(routes: Array | None) -> dict[str, Any] | None:
    """Return shape, dtype and base64 bytes; as lists of numbers the routes would be most of a file."""
    if routes is None:
        return None
    raw = np.ascontiguousarray(routes, dtype=routes.dtype.newbyteorder("<"))
    return {
        "shape": list(routes.shape),
        "dtype": routes.dtype.name,
        "base64": base64.b64encode(raw.tobytes()).decode("ascii"),
    }


def _unpacked(packed: dict[str, Any] | None) -> Array | None:
    """Undo `_packed`; also read the form of earlier dumps and checkpoints, with the bytes under "int32"."""
    if packed is None:
        return None
    if "int32" in packed:  # as checkpoints of format 2 have it
        packed = {"shape": packed["shape"], "dtype": "int32", "base64": packed["int32"]}
    dtype = np.dtype(packed.get("dtype", "int32"))
    if dtype.kind != "i":
        raise ValueError(f"routed_experts are {dtype}; they have to be whole numbers")
    raw = np.frombuffer(
        base64.b64decode(packed["base64" if "dtype" in packed else "int32"]), dtype=dtype.newbyteorder("<")
    )
    return raw.reshape(packed["shape"]).astype(dtype, copy=False)
