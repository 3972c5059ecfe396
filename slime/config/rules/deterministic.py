"""The rule for --deterministic: no setting makes a result depend on timing or on other requests.

- Used by: `rules.check`.
- Invariant: on a CPU, a run that passes without a warning produces the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.problem import Problem
from slime.config.resolve import cuda_available
from slime.config.rules.case import Case

INVARIANT_ATTENTION = ("fa3", "fa4", "flashinfer", "triton", "ascend")
"""The attention backends of SGLang whose results do not depend on the batch."""


def deterministic(case: Case) -> Iterable[Problem]:
    """Check which parts of the run can be deterministic."""
    args = case.args
    if not args.deterministic:
        return
    if case.generates and args.custom_rm_path is None and args.rm_url is not None and args.may_ask_judge:
        rule = f"slime cannot make the answers and failures of the judge at --rm-url {args.rm_url} reproducible"
        yield case.warning("deterministic", rule, "use a reward that is computed locally", also=["rm_url"])
    if cuda_available() or args.engine.on_gpus:
        rule = "bit for bit on a CPU only; on GPUs, engines and trainer use their own deterministic modes"
        yield case.warning("deterministic", rule, "compare GPU runs within a tolerance")
    if args.engines_may_use_gpus:
        yield from _sglang(case)


def _sglang(case: Case) -> Iterable[Problem]:
    """Refuse settings that SGLang's own deterministic mode does not support."""
    given = case.args.sglang
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if given.get(name) not in (None, *INVARIANT_ATTENTION):
            yield Problem(
                severity="error",
                where="--sglang-" + name.replace("_", "-"),
                value=str(given[name]),
                rule="with --deterministic: its results depend on the other requests in the batch",
                remedy=f"leave it out, or use one of {', '.join(INVARIANT_ATTENTION)}",
            )
    if given.get("speculative_algorithm") is not None:
        yield Problem(
            severity="error",
            where="--sglang-speculative-algorithm",
            value=str(given["speculative_algorithm"]),
            rule="with --deterministic: the draft tokens that are accepted depend on the other requests in the batch",
            remedy="leave one of the two out",
        )
