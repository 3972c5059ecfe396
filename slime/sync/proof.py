"""Prove that the engines hold the actor's weights, and no other weights.

- Called by: the first sync of a run (also after a resume) and tests; later syncs compare the policy version.
- Invariant: every engine's checksum after a sync is one that an engine also has after loading the actor's HF export
  from disk. That engine's weights are wiped in between, so it cannot pass if it ignores the load. The export is
  gathered and written again, so that a sync by disk is never compared with its own files.

One engine reads the export for all that have the same checksum after the sync: a hundred engines that read a large
model at once would keep its file system busy for minutes. An engine sums its own tensors (SGLang: fused, and split over
ranks), so engines of another layout have another checksum, and one of them reads the export, too.

Wiping may clear more than a checkpoint restores, such as tables that an engine computes when it starts. SGLang
spares rotary caches by name, and leaves some tensors out of the checksum by name. So engines also compute the log-probs
of a fixed prompt before and after: the run continues only if they are what they were before the proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slime.sync.transport import Transport

PROMPT = list(range(16))
"""Token ids that exist in every vocabulary."""
ANSWER_TOLERANCE = 0.02
"""The largest difference of a log-prob that bf16 kernels may cause between two runs."""


def prove_weights(transport: Transport, export: Path, *, version: int) -> None:
    """Compare the engines' checksums after the sync of `version` with those after loading `export`.

    Raises:
        RuntimeError: naming the engines whose weights differ, or those that the proof has broken.
    """
    synced = transport.checksums()
    readers = {checksum: url for url, checksum in synced.items()}  # one engine for each checksum
    before = transport.prompt_log_probs(PROMPT) if transport.engines_generate else {}
    transport.load_from_disk(str(export.absolute()), version=version, engines=list(readers.values()))
    loaded = transport.checksums()
    found = {checksum: loaded[url] for checksum, url in readers.items()}
    wrong = [
        f"{url} ({checksum}, {found[checksum]})" for url, checksum in synced.items() if checksum != found[checksum]
    ]
    if wrong:
        raise RuntimeError(
            f"weight sync, policy version {version}: engines do not hold the actor's weights: {', '.join(wrong)} "
            "(checksums after the sync, and after loading the actor's export)"
        )
    if transport.engines_generate:
        check_answers(before, transport.prompt_log_probs(PROMPT))


def check_answers(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> None:
    """Check that every engine, by URL, gives a prompt the same log-probs as before.

    Raises:
        RuntimeError: naming the engines that do not.
    """
    broken: list[str] = []
    for url, answers in before.items():
        gaps = [abs(a - b) for a, b in zip(answers, after[url], strict=True)]
        wrong = [gap for gap in gaps if not gap <= ANSWER_TOLERANCE]  # nan among them
        if wrong:
            broken.append(f"{url} (by {max(wrong):.3g})")
    if broken:
        raise RuntimeError(
            "the proof of the weight sync: with the same weights, engines now give a prompt other log-probs than "
            f"before: {', '.join(broken)}; wiping them has cleared something that a checkpoint does not restore. Add "
            "--no-check-weight-sync, and report the engine's version"
        )


def check_versions(transport: Transport, *, version: int) -> None:
    """Check that every engine reports `version`.

    Raises:
        RuntimeError: naming the engines that report another.
    """
    wrong = [f"{url} reports {found}" for url, found in transport.versions().items() if found != str(version)]
    if wrong:
        raise RuntimeError(f"weight sync: policy version {version} was sent, {', '.join(wrong)}")
