"""The engine's weights: loaded from disk, received from a trainer, and summed to a checksum.

- Called by: `server`, through `Scheduler.call`, between two steps.
- Invariant: `weight_version` names a set of weights that arrived whole. While a set is arriving the scheduler holds, so
  no token is sampled from half of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slime.engine.embedded.model import Model
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.message import short
from slime.models.families import FAMILIES
from slime.models.hf_files import HFReader

HOLD = "weight update"
GARBAGE = 0.5


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class EngineWeights:
    """Writes into `model.weights`; no other code does."""

    def __init__(self, model: Model, scheduler: Scheduler, *, sessions: bool = True) -> None:
        """`sessions` allows buckets only inside a weight-update session, as SGLang does from 0.5.21 on."""
        self._model = model
        self._scheduler = scheduler
        self.sessions = sessions
        self._session_open = False
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.weights.values()}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]
        self._arrived: set[str] = set()
        """The tensors received of the set that is arriving; empty between sets."""
        self._released = False
        self.lost = False
        """True from when the memory is given back until a whole set has arrived."""

    @property
    def complete(self) -> bool:
        return HOLD not in self._scheduler.holds

    def release(self) -> None:
        """Free the memory of all tensors."""
        self._released = self.lost = True
        self._scheduler.holds.add(HOLD)
        self._arrived.clear()
        for storage, _ in self._storages:
            storage.resize_(0)

    def take_memory(self) -> None:
        """Take the memory again, filled with garbage, so that an incomplete set cannot pass for a whole one."""
        for storage, size in self._storages:
            storage.resize_(size)
        self._released = False
        self.reset()

    def _require_memory(self) -> None:
        if self._released:
            raise ValueError("the memory of the weights was given back; POST /resume_memory_occupation first")

    def begin(self) -> None:
        """Open a weight-update session. Raises ValueError if one is open already."""
        if self._session_open:
            raise ValueError("a weight-update session is already open; call end_weight_update() first")
        self._session_open = True

    def end(self) -> None:
        """Close the session; an incomplete set of weights stays incomplete. Raises ValueError if none is open."""
        if not self._session_open:
            raise ValueError("no weight-update session is open; call begin_weight_update() first")
        self._session_open = False

    def require_session(self, endpoint: str) -> None:
        """Raise ValueError if `endpoint` needs an open session and there is none."""
        if self.sessions and not self._session_open:
            name = endpoint.removeprefix("/")
            raise ValueError(f"{name} must run between begin_weight_update() and end_weight_update()")

    def check(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Raise ValueError if a tensor is not the model's, or the memory was given back."""
        self._require_memory()
        weights = self._model.weights
        unknown = [n for n in names if n not in weights]
        if unknown:
            raise ValueError(f"this model has no tensor {_some(unknown)}; it has {len(weights)}, by HF names")
        for name, shape in zip(names, shapes, strict=True):
            if tuple(shape) != tuple(weights[name].shape):
                raise ValueError(f"{name} is sent as {list(shape)}, the model's is {list(weights[name].shape)}")
        if len(set(names)) != len(names):
            raise ValueError(f"a tensor is sent twice: {_some({n for n in names if list(names).count(n) > 1})}")

    def write_bucket(self, names: Sequence[str], tensors: Sequence[Tensor], *, version: str | None, flush: bool) -> str:
        """Write one bucket of a set, and return a message for the answer.

        A set is every tensor of the model, in any order and number of buckets; the last bucket names the `version`.
        From its first bucket on the scheduler holds, until a set is whole. A tensor that arrives again begins a new
        set, because the sender started over.

        For example, for a model of tensors a, b and c: the bucket (a, b) without a version makes the scheduler hold,
        and the bucket (c) with version "7" completes the set. A second bucket (a) instead would begin a new set.

        Raises:
            ValueError: not this model's tensors (nothing is written then), or a version arrives before all tensors have
                (it does not count then, and a whole set has to be sent again).
        """
        self.check(names, [t.shape for t in tensors])
        if not self._arrived.isdisjoint(names):
            self._arrived.clear()
        self._scheduler.holds.add(HOLD)
        for name, tensor in zip(names, tensors, strict=True):
            self._model.weights[name].copy_(tensor)
        self._arrived.update(names)
        self._forget_cache(flush=flush)
        missing = set(self._model.weights) - self._arrived
        if not missing:
            self._settle(version)
            return f"all {len(self._model.weights)} tensors have arrived"
        if version is None:
            return f"{len(self._arrived)} of {len(self._model.weights)} tensors have arrived"
        self._arrived.clear()
        raise ValueError(
            f"weight version {version} is incomplete: {_some(missing)} did not arrive; send a whole set, "
            "or load one from disk (no token is generated before that)"
        )

    def load(self, path: str | Path, *, version: str | None, flush: bool = True) -> None:
        """Load all weights from an HF directory.

        Raises:
            ValueError: a tensor is missing or left over (nothing is written then), or has another shape (no token is
                generated until a whole set has arrived).
        """
        self._require_memory()
        try:
            reader, weights = HFReader(path), self._model.weights
        except OSError as error:
            raise ValueError(f"{short(str(path))}: {error}; name a Hugging Face directory") from error
        extra = {n for n in reader.names() if n not in weights and not self._may_skip(n)}
        missing = set(weights) - set(reader.names())
        if missing or extra:
            problem = f"has no {_some(missing)}" if missing else f"has {_some(extra)}, which this model does not know"
            raise ValueError(f"{path} {problem}; name a checkpoint of the model that this engine serves")
        self._scheduler.holds.add(HOLD)
        for name, target in weights.items():
            tensor = reader.get(name)
            self.check([name], [tensor.shape])
            target.copy_(tensor)
        self._forget_cache(flush=flush)
        self._settle(version)

    def _may_skip(self, name: str) -> bool:
        """Return whether a tensor may be ignored: a tied output layer that is stored twice, RoPE's frequencies in older
        files, or the family's MTP layer."""
        a = self._model.architecture
        tied = a.tied_embeddings and name == "lm_head.weight"
        ignored = FAMILIES[a.family].ignored_prefix(a)
        return tied or (ignored is not None and name.startswith(ignored)) or name.endswith("rotary_emb.inv_freq")

    def _settle(self, version: str | None) -> None:
        self._arrived.clear()
        self.lost = False
        self._scheduler.holds.discard(HOLD)
        if version is not None:
            self._scheduler.weight_version = version

    def _forget_cache(self, *, flush: bool) -> None:
        """Forget shared prompts; with `flush`, prefill running requests again, otherwise they keep their KV."""
        self._scheduler.forget_prompts()
        if flush:
            self._scheduler.retract()
            self._scheduler.cache.clear()

    def reset(self) -> None:
        """Fill every tensor with a constant, so that a sync that writes nothing cannot pass a comparison."""
        self._require_memory()
        for tensor in self._model.weights.values():
            tensor.fill_(GARBAGE)
        self._arrived.clear()
        self._forget_cache(flush=True)

    def checksum(self) -> str:
        """Return a digest of names, dtypes, shapes and bytes in the order of names, whatever their source."""
        self._require_memory()
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._model.weights):
            tensor = self._model.weights[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            # Copy first: memory that numpy has seen cannot be resized, so it could not be given back.
            digest.update(tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().data)
        return digest.hexdigest()
