"""A checkpoint of one moment: taken while training stands still, and written at any time after that.

- Used by: `save_load` takes it; the trainer writes it in `background`, the converters at once.
- Invariant: after `take` nothing in it changes any more, whatever training does. A directory gets its name only after
  all ranks have written, and a write that fails leaves nothing.

    take    (all ranks, training waits)   names, offsets and bytes of what each rank writes; nothing is written
    write   (all ranks, in a thread)      each rank its file -> rank 0: .metadata, common.pt, state, manifest -> rename
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from slime.megatron import device
from slime.megatron.checkpoint import files, manifest, state_arrays, torch_dist
from slime.megatron.checkpoint.search import on_rank_zero
from slime.megatron.checkpoint.staging import Staging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """The content of one model's checkpoint: `state` has sharded tensors and settings, `header` is for the manifest.

    Both are those of the moment. Rank 0's `header` and `texts` (small files, by name) are written.
    """

    state: dict[str, Any]
    header: dict[str, Any]
    inside: str = ""
    """The directory in the checkpoint; empty for the checkpoint itself."""
    texts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class _Part:
    """A model whose bytes this rank has."""

    model: Model
    share: torch_dist.Share
    common: bytes
    """The file of settings; empty except on rank 0."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is not written yet."""

    directory: Path
    tracker: str
    is_copy: bool
    """Whether the bytes are copies; otherwise it has to be written before training goes on."""
    keep_last: int | None
    saved: int | None
    _parts: Sequence[_Part]

    def write(self, group: dist.ProcessGroup | None = None) -> Path:
        """Write it, give it its name, and return its path. Collective over `group`; None: over all ranks.

        Raises:
            RuntimeError: it cannot be written; nothing of it is left.
        """
        first = dist.get_rank() == 0
        with files.nothing_left_of(self.directory, removes=first):
            outcomes: list[Any] | None = [None] * dist.get_world_size() if first else None
            dist.gather_object(_outcome(self._write_share), outcomes, group=group)
            return on_rank_zero(lambda: self._complete(outcomes or []), group)

    def _write_share(self) -> list[torch_dist.WrittenShare]:
        return [torch_dist.write_share(self.directory / part.model.inside, part.share) for part in self._parts]

    def _complete(self, outcomes: Sequence[tuple[list[torch_dist.WrittenShare], str | None]]) -> Path:
        """Write what rank 0 writes, after all ranks have written theirs, and give the directory its name."""
        for _, error in outcomes:
            if error is not None:
                raise OSError(error)
        for number, part in enumerate(self._parts):
            directory, shares = self.directory / part.model.inside, [written[number] for written, _ in outcomes]
            torch_dist.write_metadata(directory, shares, part.common)
            for name, text in part.model.texts.items():
                (directory / name).write_text(text)
            plain, arrays = state_arrays.split(part.model.header)
            state_arrays.write_arrays(directory, arrays)
            digests = {name: value for share in shares for name, value in share.digests.items()}
            # after all other files: it holds their sizes and digests
            manifest.write_state(directory, plain, {**digests, **manifest.digests_of_small_files(directory)})
        path = files.commit(self.directory, self.tracker)
        if self.keep_last is not None and self.saved is not None:
            for removed in files.remove_old(path.parent, self.keep_last, saved=self.saved):
                logger.info("removed the old checkpoint %s (--keep-last-checkpoints %d)", removed, self.keep_last)
        return path


def take(
    save_dir: Path,
    name: str,
    models: Sequence[Model],
    *,
    tracker: str,
    staging: Staging | None,
    keep_last: int | None = None,
    saved: int | None = None,
) -> Snapshot:
    """Return a snapshot for `<save_dir>/<name>`, whose temporary directory is made. Collective.

    Args:
        models: the last one is the checkpoint itself.
        staging: memory for the copies; None: nothing is copied.
        keep_last: remove all but so many checkpoints up to the rollout `saved`, which this one is.
    """
    directory = on_rank_zero(lambda: files.begin(save_dir, name))
    with files.nothing_left_of(directory, removes=dist.get_rank() == 0):
        on_rank_zero(lambda: [(directory / model.inside).mkdir(exist_ok=True) for model in models])
        sharded: list[Any] = []
        commons: list[bytes] = []
        for model in models:
            tensors, common = save_preprocess(dict(model.state), validate_access_integrity=False)
            assert isinstance(tensors, dict)
            sharded.append(torch_dist.own_part(tensors))
            commons.append(_saved(common) if dist.get_rank() == 0 else b"")
        pieces = [piece for part in sharded for piece in torch_dist.tensors_of(part)]
        copies = None if staging is None else staging.copies([piece.data for piece in pieces])
        if copies is not None:
            for piece, copy in zip(pieces, copies, strict=True):
                piece.data = copy
        parts = [
            _Part(model, torch_dist.Share.of(part), common)
            for model, part, common in zip(models, sharded, commons, strict=True)
        ]
        device.synchronize()  # only now: the shares were planned while a GPU copied
    return Snapshot(directory, tracker, copies is not None, keep_last, saved, parts)


def _saved(common: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(common, stream)
    return stream.getvalue()


def _outcome(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result and None, or None and the error: rank 0 waits for either."""
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001  torch's writer raises all kinds
        return None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
