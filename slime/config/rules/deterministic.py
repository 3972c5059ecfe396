"""--deterministic: what would make a result depend on the moment, or on other requests, beside it.

Path: part of `rules`. Invariant: what passes here without a warning is, on a CPU, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.resolve import cuda_available
from slime.config.reward_types import may_ask_remote
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem

INVARIANT_ATTENTION = ("fa3", "fa4", "flashinfer", "triton", "ascend")
"""SGLang's attention backends whose results do not depend on the batch."""


def deterministic(case: Case) -> Iterable[Problem]:
    args = case.args
    if not args.deterministic:
        return
    if case.generates and args.custom_rm_path is None and args.rm_url is not None and may_ask_remote(args):
        rule = f"no promise for the judge behind --rm-url {args.rm_url}: its answers and its failures are not slime's"
        yield case.warning("deterministic", rule, "take a reward that is computed here", beside=["rm_url"])
    if cuda_available() or args.rollout_engine == "sglang":
        rule = "bit for bit on a CPU alone; on GPUs, engines and trainer are asked for their deterministic modes"
        yield case.warning("deterministic", rule, "compare GPU runs within a tolerance")
    if args.rollout_engine != "embedded" and not args.rollout_external_engines:
        yield from _sglang(case)


def _sglang(case: Case) -> Iterable[Problem]:
    """Settings beside which SGLang's own deterministic mode cannot be had."""
    given = case.args.sglang
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if given.get(name) not in (None, *INVARIANT_ATTENTION):
            yield Problem(
                severity="error",
                where="--sglang-" + name.replace("_", "-"),
                value=str(given[name]),
                rule="beside --deterministic: its results depend on what else is in the batch",
                remedy=f"leave it out, or take one of {', '.join(INVARIANT_ATTENTION)}",
            )
    if given.get("speculative_algorithm") is not None:
        yield Problem(
            severity="error",
            where="--sglang-speculative-algorithm",
            value=str(given["speculative_algorithm"]),
            rule="beside --deterministic: which guessed tokens are taken depends on what else is in the batch",
            remedy="leave one of the two out",
        )
