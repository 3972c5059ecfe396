"""`SamplingRecord`: the sampling parameters and tokenizer of a rollout dump, in the dump's first line.

- Used by: `rollout.dump`, which writes it with --save-debug-rollout-data; a rule, which reads it before a replay
  starts; the rollout manager, which reads it again with each file.
- Invariant: only plain JSON is read, and only the fields declared here.

Training computes log-probs of the whole softmax at --rollout-temperature. A dump from another distribution (top-p,
top-k, another temperature) or with another tokenizer does not fit this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from slime.config.args import Args
from slime.config.vocabulary import vocabulary_digest

FORMAT = "slime rollout"
"""The key of the record's format number, which identifies its line."""
LONGEST = 65536
"""The largest number of bytes in a record's line."""
OFF: Mapping[str, float] = {"top_p": 1.0, "top_k": -1.0, "min_p": 0.0}
"""Sampling parameters that exclude tokens from the distribution, with the value at which they exclude none."""


@dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """The first line of a dump: how its samples were generated."""

    sampling: Mapping[str, float] | None
    """The temperature and the parameters in OFF; None: nothing was sampled, the responses come from the data."""
    tokenizer: str | None
    """The `vocabulary_digest` of --hf-checkpoint."""
    vocab_size: int | None

    @classmethod
    def of(cls, args: Args, sampling: Mapping[str, float] | None) -> SamplingRecord:
        """Return the record of a run that samples with `sampling`."""
        size = None if args.architecture is None else args.architecture.vocab_size
        digest = None if args.hf_checkpoint is None else vocabulary_digest(args.hf_checkpoint)
        return cls(sampling=sampling, tokenizer=digest, vocab_size=size)

    def line(self) -> str:
        """Return the dump's first line."""
        return json.dumps({FORMAT: 1, **asdict(self)})

    def other_distribution(self, args: Args) -> list[str]:
        """Return differences between the dump's sampling and what training assumes, each with its remedy."""
        if self.sampling is None:
            return ["its responses come from the data, and no policy sampled them (train on it with sft_loss)"]
        found: list[str] = []
        for name, off in OFF.items():
            value = self.sampling.get(name, off)
            if value != off and not (name == "top_k" and value == 0):
                found.append(f"it was sampled with {name.replace('_', '-')} {value:g} (dump it again without)")
        temperature = self.sampling["temperature"]
        if temperature != args.rollout_temperature:
            found.append(
                f"it was sampled at temperature {temperature:g}, but --rollout-temperature is "
                f"{args.rollout_temperature:g} (give --rollout-temperature {temperature:g})"
            )
        return found

    def other_tokens(self, args: Args) -> list[str]:
        """Return the fault and the remedy if the dump has another tokenizer than --hf-checkpoint; otherwise nothing."""
        here = SamplingRecord.of(args, None)
        if self.tokenizer is not None and here.tokenizer is not None:
            same = self.tokenizer == here.tokenizer
        else:
            same = None in (self.vocab_size, here.vocab_size) or self.vocab_size == here.vocab_size
        if same:
            return []
        sizes = ""
        if self.vocab_size != here.vocab_size:
            sizes = f", with {self.vocab_size} tokens instead of {here.vocab_size}"
        return [
            f"its tokens come from another tokenizer than that of --hf-checkpoint {args.hf_checkpoint}{sizes} (name "
            "the model that generated it)"
        ]

    def faults(self, args: Args) -> list[str]:
        """Return all reasons why training cannot replay the dump with these flags."""
        sampled = [] if args.loss_type == "sft_loss" else self.other_distribution(args)
        return sampled + self.other_tokens(args)


def read_record(path: Path) -> SamplingRecord | None:
    """Return the record in a dump's first line, or None if an older slime wrote the dump without one.

    Raises:
        ValueError: the first line is neither a record nor a group.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        line = file.readline(LONGEST)
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return _parsed(json.loads(line))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}:1 is not the first line of a rollout dump: {error}") from error


def _parsed(data: dict[str, Any]) -> SamplingRecord:
    if FORMAT not in data:
        raise ValueError(f"it has no entry {FORMAT!r}")
    if data[FORMAT] != 1:
        raise ValueError(f"its format is {data[FORMAT]!r}, but this version reads only 1")
    sampling, tokenizer, size = data["sampling"], data["tokenizer"], data["vocab_size"]
    if sampling is not None:
        sampling = {str(name): float(value) for name, value in cast(dict[Any, Any], sampling).items()}
        unknown = sampling.keys() - {"temperature", *OFF}
        if unknown:
            raise ValueError(f"unknown sampling parameters {', '.join(sorted(unknown))}")
        if "temperature" not in sampling:
            raise ValueError("no temperature")
    if not (tokenizer is None or isinstance(tokenizer, str)) or not (size is None or isinstance(size, int)):
        raise ValueError("tokenizer must be a text, and vocab_size a number")
    return SamplingRecord(sampling=sampling, tokenizer=tokenizer, vocab_size=size)
