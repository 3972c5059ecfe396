"""`--rm-type code`: 1 if the response's last block of Python passes the row's tests, else 0.

- Called by: `reward` finds it in the table of types. The tests are metadata.tests or the label (`core.code_tests`).
- Invariant: a sandbox that fails raises, so that the sample has no reward; it is never a 0.
"""

from __future__ import annotations

import re

from slime.config.args import Args
from slime.core.boxes import Answer
from slime.core.code_tests import code_tests
from slime.core.sample import Sample
from slime.rollout.rewards.response import final_text
from slime.rollout.rewards.reward import Reward, Scored
from slime.sandbox.judging import judge
from slime.sandbox.run import Limits, Outcome

_FENCE = re.compile(r"^[ ]{0,3}```[ \t]*([\w+-]*)[^`\n]*$")
_LANGUAGES = ("", "python", "python3", "py")
_SHARE = 0.7
"""The part of --rm-timeout that the tests may take. The rest is for starting and ending the sandbox, because a call
that takes longer than --rm-timeout has no verdict."""


def read_code(response: str) -> Answer | None:
    r"""Return the last complete ``` block of Python after the last </think>, or of no language; None without one.

    >>> read_code("Here it is:\n```python\nprint(1)\n```\nRun it: ```x```").text
    'print(1)\n'
    """
    block: list[str] | None = None
    last: str | None = None
    language = ""
    for line in final_text(response).split("\n"):
        fence = _FENCE.match(line.rstrip("\r"))
        if block is None:
            if fence is not None:
                block, language = [], fence[1].lower()
        elif fence is not None and not fence[1]:
            if language in _LANGUAGES:
                last = "".join(f"{each}\n" for each in block)
            block = None
        else:
            block.append(line)
    return None if last is None else Answer(last)


def code_score(args: Args, sample: Sample, answer: Answer | None) -> Scored:
    """Return 1 if the code passes all tests, else 0, with the verdict's name. A response without code is wrong.

    Raises:
        SandboxFault: the sandbox failed.
        ValueError: the row has no tests.
    """
    tests = code_tests(sample.label, sample.metadata)
    if answer is None:
        return Scored(0.0, Outcome.WRONG.value)
    judged = judge(answer.text, tests, kind=args.sandbox, limits=Limits(), seconds=args.rm_timeout * _SHARE)
    return Scored(float(judged.outcome is Outcome.RIGHT), judged.outcome.value)


REWARD = Reward(read=read_code, score=code_score, reports_format=True)
