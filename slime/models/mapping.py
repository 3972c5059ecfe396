"""Weight tables: how a Megatron parameter and its Hugging Face tensors are made from each other.

- Used by: a family file (`glm4`, `llama`) lists the rules, `families.weight_table` makes the table, and import from HF,
  export to HF and weight sync (`megatron.model.hf_weights`) all read that one table.
- Invariant: every Megatron parameter has exactly one rule, and every HF name comes from exactly one rule. Both
  directions copy bits exactly.

Names are global: `decoder.layers.7...` is layer 7 of the model, whatever pipeline stage has it. A "full" tensor is
whole over tensor parallelism, and its vocabulary is that of config.json, without Megatron's padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where it is used: config reads the families at every start and should not wait seconds for torch.


def _cat(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    import torch

    return torch.cat(list(parts), axis)


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron name and its HF names; `{layer}` and `{expert}` in both are filled in for each layer and expert."""

    megatron: str
    hf: tuple[str, ...]
    layers: range | None = field(default=None, kw_only=True)
    """The layers that have it; None means all."""
    num_experts: int = field(default=0, kw_only=True)
    """The number of experts of a layer, each with its own tensor; 0: the rule is not for experts.

    Expert parallelism distributes whole experts to ranks, and expert tensor parallelism cuts each of them.
    """

    @property
    def tp_axis(self) -> int | None:
        """The axis that tensor parallelism cuts; None if every rank has the whole tensor."""
        return 0

    @abstractmethod
    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        """Return the HF tensors, in the order of `hf`."""

    @abstractmethod
    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Return Megatron's tensor from the HF tensors; undoes `export`."""

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        """Return the part of `full` that one tensor-parallel rank holds."""
        if self.tp_axis is None or tp_size == 1:
            return full
        self._check_divisible(full.shape[self.tp_axis], tp_size, "rows" if self.tp_axis == 0 else "columns")
        return full.chunk(tp_size, self.tp_axis)[tp_rank]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from all ranks' parts; undoes `split`."""
        if self.tp_axis is None or len(shards) == 1:
            return shards[0]
        return _cat(shards, self.tp_axis)

    def _check_divisible(self, size: int, tp_size: int, what: str) -> None:
        if size % tp_size:
            flag = "expert-tensor-parallel-size" if self.num_experts else "tensor-model-parallel-size"
            raise ValueError(
                f"--{flag} {tp_size}: {self.megatron} has {size} {what}, which are not divisible by it; "
                f"choose a divisor of {size}"
            )

    def at(self, layer: int) -> Iterable[Rule]:
        """Yield the rules for one layer: none, one, or one for each expert."""
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
    """One tensor that has different names in Megatron and HF."""

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
    """A table with one row for each token. Megatron pads its rows; HF has `vocab_size` rows."""

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
    """Query, key and value projections (weight or bias) as one tensor, interleaved by query group.

    Megatron orders the rows by group: the group's query heads, then its key head, then its value head. With 4 query
    heads and 2 groups these are q0 q1 k0 v0 q2 q3 k1 v1, where HF has three tensors: q0 q1 q2 q3, k0 k1 and v0 v1.
    Tensor parallelism cuts between groups, so a rank holds whole groups. With more ranks than groups, several ranks
    share one group and Megatron gathers it before use.
    """

    num_query_groups: int
    num_attention_heads: int
    head_dim: int

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        import torch

        queries = self.num_attention_heads // self.num_query_groups * self.head_dim
        groups = full.view(self.num_query_groups, queries + 2 * self.head_dim, *full.shape[1:])
        parts = torch.split(groups, [queries, self.head_dim, self.head_dim], dim=1)
        return tuple(part.reshape(-1, *full.shape[1:]) for part in parts)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        rows = (self.num_attention_heads, self.num_query_groups, self.num_query_groups)
        for name, part, heads in zip(self.hf, parts, rows, strict=True):
            if part.shape[0] != heads * self.head_dim:
                raise ValueError(
                    f"{name} has {part.shape[0]} rows, the architecture has {heads} heads of {self.head_dim}: "
                    "--num-attention-heads, --num-query-groups or --kv-channels is not this checkpoint's"
                )
        groups = [part.reshape(self.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return _cat(groups, 1).flatten(0, 1)

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        if tp_size % self.num_query_groups:
            self._check_divisible(self.num_query_groups, tp_size, "query groups")
        return super().split(full, tp_size, tp_rank)


@dataclass(frozen=True)
class GateUp(Rule):
    """The two halves of a gated MLP, [gate; up], which HF stores as one tensor or as two.

    A tensor-parallel rank holds its part of gate followed by its part of up. With TP 2 the rows g0 g1 u0 u1 become g0
    u0 on rank 0 and g1 u1 on rank 1.
    """

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,) if len(self.hf) == 1 else full.chunk(2)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else _cat(parts)

    def split(self, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        if tp_size == 1:
            return full
        self._check_divisible(full.shape[0] // 2, tp_size, "rows a half")
        return _cat([half.chunk(tp_size)[tp_rank] for half in full.chunk(2)])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return _cat([*gates, *ups])


def pad_vocab(full: Tensor, padded: int) -> Tensor:
    """Append zero rows to `full`, up to `padded` rows.

    Megatron masks the padding out of every softmax, so these rows get no gradient and stay zero.
    """
    if full.shape[0] > padded:
        raise ValueError(f"a vocabulary of {full.shape[0]} rows cannot be padded to {padded}")
    if full.shape[0] == padded:
        return full
    return _cat([full, full.new_zeros(padded - full.shape[0], *full.shape[1:])])


class WeightTable:
    """All rules of one model, with layers and experts filled in, in the order of export."""

    def __init__(
        self,
        rules: Sequence[Rule],
        num_layers: int,
        optional_hf: Mapping[str, str] | None = None,
        left_out: str | None = None,
    ) -> None:
        """Fill in the layers of all rules.

        Args:
            optional_hf: HF names that a checkpoint may have in addition, as copies of another HF tensor.
            left_out: a prefix of HF names that are neither read nor written.
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
        """Yield the rules before the layers, then those of each layer, then the rest."""
        layered = [i for i, rule in enumerate(rules) if "{layer}" in rule.megatron]
        first, last = (layered[0], layered[-1] + 1) if layered else (0, 0)
        yield from rules[:first]
        for layer in range(num_layers):
            yield from (own for rule in rules[first:last] for own in rule.at(layer))
        yield from rules[last:]

    def megatron_names(self) -> list[str]:
        return list(self.rules)

    def hf_names(self) -> list[str]:
        """Return every HF name, in the order of export."""
        return [name for rule in self.rules.values() for name in rule.hf]

    def rule(self, megatron_name: str) -> Rule:
        if megatron_name not in self.rules:
            raise ValueError(f"weight table: no rule for Megatron's parameter {megatron_name}")
        return self.rules[megatron_name]

    def to_hf(self, megatron_name: str, full: Tensor) -> list[tuple[str, Tensor]]:
        """Return the HF names and tensors of one whole parameter, without the padding of the vocabulary."""
        rule = self.rule(megatron_name)
        return list(zip(rule.hf, rule.export(full), strict=True))

    def from_hf(self, megatron_name: str, get: Callable[[str], Tensor]) -> Tensor:
        """Return the whole parameter, without the padding of the vocabulary; `get` returns a tensor by its HF name."""
        rule = self.rule(megatron_name)
        return rule.merge([get(name) for name in rule.hf])

    def pad(self, megatron_name: str, full: Tensor, padded_vocab_size: int) -> Tensor:
        """Return `full` as Megatron stores it: a vocabulary is padded, anything else is returned unchanged."""
        return pad_vocab(full, padded_vocab_size) if isinstance(self.rule(megatron_name), Vocabulary) else full

    def split(self, megatron_name: str, full: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        return self.rule(megatron_name).split(full, tp_size, tp_rank)

    def join(self, megatron_name: str, shards: Sequence[Tensor]) -> Tensor:
        return self.rule(megatron_name).join(shards)

    def check(self, megatron_names: Iterable[str], hf_names: Iterable[str]) -> None:
        """Check that the names on both sides are those of the table.

        Raises:
            ValueError: names without a rule, or rules without a name, on either side; the message lists all of them.
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
