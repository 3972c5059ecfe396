"""Weight tables: how a Megatron parameter and its Hugging Face tensors are made of each other.

Path: a family file (`glm4`, `qwen`) writes the rules down, `families.weight_table` makes the table, and import from
HF, export to HF and weight sync (`megatron.hf_weights`) all read that one table. Invariant: every Megatron
parameter has exactly one rule and every HF name comes from exactly one; both directions are exact copies of bits.

Names are global: `decoder.layers.7...` is the model's layer 7 on whatever pipeline stage it lives. "Full" tensors
are whole over tensor parallelism, and their vocabulary is config.json's, without Megatron's padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron name and the HF names it stands for; `{layer}` and `{expert}` in both are filled in for each."""

    megatron: str
    hf: tuple[str, ...]
    layers: range | None = field(default=None, kw_only=True)
    """The layers that have it; None: all."""
    num_experts: int = field(default=0, kw_only=True)
    """Of a layer: each has its own. Expert parallelism deals them to ranks, expert tensor parallelism cuts them."""

    @property
    def tp_axis(self) -> int | None:
        """The axis that tensor parallelism cuts, None where every rank holds the whole tensor."""
        return 0

    @abstractmethod
    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        """The HF tensors, in the order of `hf`."""

    @abstractmethod
    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor from the HF ones; undoes `export`."""

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        """The part of `full` that one tensor-parallel rank holds."""
        if self.tp_axis is None or tp_size == 1:
            return full
        self._check_divisible(full.shape[self.tp_axis], tp_size, "rows" if self.tp_axis == 0 else "columns")
        return full.chunk(tp_size, self.tp_axis)[tp_rank]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor from all ranks' parts; undoes `split`."""
        if self.tp_axis is None or len(shards) == 1:
            return shards[0]
        return torch.cat(list(shards), self.tp_axis)

    def _check_divisible(self, size: int, tp_size: int, what: str) -> None:
        if size % tp_size:
            flag = "expert-tensor-parallel-size" if self.num_experts else "tensor-model-parallel-size"
            raise ValueError(
                f"--{flag} {tp_size}: {self.megatron} has {size} {what}, which it does not divide; "
                f"choose a divisor of {size}"
            )

    def at(self, layer: int) -> Iterable[Rule]:
        """The rules for one layer: none, one, or one an expert."""
        if self.layers is not None and layer not in self.layers:
            return []
        own = self._filled("{layer}", layer)
        return [own._filled("{expert}", expert) for expert in range(self.num_experts)] if self.num_experts else [own]

    def _filled(self, place: str, number: int) -> Rule:
        return replace(
            self,
            megatron=self.megatron.replace(place, str(number)),
            hf=tuple(name.replace(place, str(number)) for name in self.hf),
        )


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name."""

    axis: int | None = None

    @property
    def tp_axis(self) -> int | None:
        return self.axis

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class Vocabulary(Rule):
    """A table with one row a token. Megatron pads its rows; HF has `vocab_size` of them."""

    vocab_size: int

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full[: self.vocab_size],)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].shape[0] != self.vocab_size:
            raise ValueError(
                f"{self.hf[0]} has {parts[0].shape[0]} rows, the vocabulary has {self.vocab_size}: --vocab-size (or "
                f"config.json's vocab_size) is not this checkpoint's"
            )
        return parts[0]


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections (weight or bias) as one, interleaved by query group.

    Megatron's rows: for every group its query heads, then its key, then its value. Tensor parallelism cuts
    between groups, so that a rank holds whole groups; with more ranks than groups, several ranks share one and
    Megatron gathers it before use.
    """

    num_query_groups: int
    num_attention_heads: int
    head_dim: int

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        queries = self.num_attention_heads // self.num_query_groups * self.head_dim
        groups = full.view(self.num_query_groups, queries + 2 * self.head_dim, *full.shape[1:])
        parts = torch.split(groups, [queries, self.head_dim, self.head_dim], dim=1)
        return tuple(part.reshape(-1, *full.shape[1:]) for part in parts)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        rows = (self.num_attention_heads, self.num_query_groups, self.num_query_groups)
        for name, part, heads in zip(self.hf, parts, rows, strict=True):
            if part.shape[0] != heads * self.head_dim:
                raise ValueError(
                    f"{name} has {part.shape[0]} rows, the architecture says {heads} heads of {self.head_dim}: "
                    "--num-attention-heads, --num-query-groups or --kv-channels is not this checkpoint's"
                )
        groups = [part.reshape(self.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        if tp_size % self.num_query_groups:
            self._check_divisible(self.num_query_groups, tp_size, "query groups")
        return super().split(full, tp_size, tp_rank)


@dataclass(frozen=True)
class GateUp(Rule):
    """The two halves of a gated MLP, [gate; up]. HF has them as one tensor or as two.

    A tensor-parallel rank holds its part of the gate followed by its part of up.
    """

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,) if len(self.hf) == 1 else full.chunk(2)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        if tp_size == 1:
            return full
        self._check_divisible(full.shape[0] // 2, tp_size, "rows a half")
        return torch.cat([half.chunk(tp_size)[tp_rank] for half in full.chunk(2)])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


def pad_vocab(full: Tensor, padded: int) -> Tensor:
    """`full` with zero rows appended up to `padded`.

    Zeros, since Megatron's padding is masked out of every softmax: the rows get no gradient, and stay zero.
    """
    if full.shape[0] > padded:
        raise ValueError(f"a vocabulary of {full.shape[0]} rows cannot be padded to {padded}")
    return (
        torch.cat([full, full.new_zeros(padded - full.shape[0], *full.shape[1:])]) if full.shape[0] < padded else full
    )


class WeightTable:
    """All rules of one model, layers filled in, in the order of export."""

    def __init__(
        self,
        rules: Sequence[Rule],
        num_layers: int,
        optional_hf: Mapping[str, str] | None = None,
        left_out: str | None = None,
    ) -> None:
        """What a checkpoint may hold besides, and what is never written.

        Args:
            optional_hf: HF names that are a copy of another HF tensor.
            left_out: the beginning of HF names that nothing here reads.
        """
        self.optional_hf = dict(optional_hf or {})
        self.left_out = left_out
        self.rules: dict[str, Rule] = {}
        for rule in self._filled_in(rules, num_layers):
            if rule.megatron in self.rules:
                raise ValueError(f"weight table: two rules for {rule.megatron}")
            self.rules[rule.megatron] = rule
        names = self.hf_names()
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"weight table: two rules make {twice}")

    @staticmethod
    def _filled_in(rules: Sequence[Rule], num_layers: int) -> Iterable[Rule]:
        """Rules before the layers, then layer by layer, then the rest."""
        layered = [i for i, rule in enumerate(rules) if "{layer}" in rule.megatron]
        first, last = (layered[0], layered[-1] + 1) if layered else (0, 0)
        yield from rules[:first]
        for layer in range(num_layers):
            yield from (own for rule in rules[first:last] for own in rule.at(layer))
        yield from rules[last:]

    def megatron_names(self) -> list[str]:
        return list(self.rules)

    def hf_names(self) -> list[str]:
        """Every HF name, in the order of export."""
        return [name for rule in self.rules.values() for name in rule.hf]

    def rule(self, megatron_name: str) -> Rule:
        if megatron_name not in self.rules:
            raise ValueError(f"weight table: no rule for Megatron's parameter {megatron_name}")
        return self.rules[megatron_name]

    def to_hf(self, megatron_name: str, full: Tensor) -> list[tuple[str, Tensor]]:
        """HF names and tensors of one whole parameter; the vocabulary's padding is cut off."""
        rule = self.rule(megatron_name)
        return list(zip(rule.hf, rule.export(full), strict=True))

    def from_hf(self, megatron_name: str, get: Callable[[str], Tensor]) -> Tensor:
        """The whole parameter, vocabulary not padded; `get` fetches a tensor by its HF name."""
        rule = self.rule(megatron_name)
        return rule.merge([get(name) for name in rule.hf])

    def pad(self, megatron_name: str, full: Tensor, padded_vocab_size: int) -> Tensor:
        """`full` as Megatron has it: a vocabulary gets its padding, anything else is returned as it is."""
        return pad_vocab(full, padded_vocab_size) if isinstance(self.rule(megatron_name), Vocabulary) else full

    def split(self, megatron_name: str, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        return self.rule(megatron_name).split(full, tp_size, tp_rank)

    def join(self, megatron_name: str, shards: Sequence[Tensor]) -> Tensor:
        return self.rule(megatron_name).join(shards)

    def check(self, megatron_names: Iterable[str], hf_names: Iterable[str]) -> None:
        """Both sides against the table.

        Raises:
            ValueError: names without a rule, or rules without a name, on either side; all of them are listed.
        """
        if self.left_out is not None:
            hf_names = [name for name in hf_names if not name.startswith(self.left_out)]
        hf_names = set(hf_names)
        sides = {
            "Megatron parameters without a rule": set(megatron_names) - set(self.rules),
            "rules for Megatron parameters that the model lacks": set(self.rules) - set(megatron_names),
            "Hugging Face tensors without a rule": hf_names - set(self.hf_names()) - set(self.optional_hf),
            "Hugging Face tensors that are missing": set(self.hf_names()) - hf_names,
        }
        problems = [f"{what}: {', '.join(sorted(names))}" for what, names in sides.items() if names]
        if problems:
            raise ValueError("the weight table does not fit (is --hf-checkpoint this model?): " + "; ".join(problems))
