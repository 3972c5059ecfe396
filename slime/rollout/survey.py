"""The survey of the data that a plan shows: rows, lengths of prompts, the first prompt, and the first label's check.

- Called by: `cluster.main`, in a --dry-run, after all rules have passed. A real run loads and checks every row instead.
- Invariant: prompts are rendered and tokenized by the functions of a real run; only the tokenizer's class is lighter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, cast

from slime.config.args import Args
from slime.config.context import longest_prompt, rollout_limits
from slime.config.data_files import count_rows, read_rows, split_slice
from slime.config.data_paths import data_paths
from slime.config.data_rows import DataError, DataKeys, Row
from slime.config.eval_data import readable_eval_datasets
from slime.config.labels import right_letter, stated_answer
from slime.config.prompt_format import PromptFormat
from slime.config.reward_types import needs_label
from slime.config.router_policy import router_policy
from slime.core.boxes import last_boxed
from slime.core.printable import one_line, printable
from slime.core.sample import Sample
from slime.core.small_files import is_file
from slime.rollout.plan_tokenizer import PlanTokenizer
from slime.rollout.prompts import prompt_text
from slime.rollout.rewards.reward import Scored, find_reward, reward_of
from slime.rollout.sft_rollout import fill, num_trained
from slime.rollout.tokenizer import tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 200
"""The number of examples to learn from that are tokenized; a conversation takes milliseconds."""
SURVEYED = 2_000
"""The number of rows of each file whose prompts are tokenized."""
_SHOWN = 400
"""Characters of a prompt that are shown."""

Line = tuple[str, str]
"""A name and a text, as in the sections of a plan."""


@dataclass(frozen=True)
class _Set:
    """A data set of the run. `longest`: the most tokens of a prompt that is kept."""

    name: str
    words: str | Sequence[str]
    keys: DataKeys
    form: PromptFormat
    longest: int | None
    rm_type: str | None
    trains: bool = False
    """True for the prompts of training rollouts."""


def survey(args: Args) -> list[Line]:
    """Return the lines about each data set whose files are on this machine."""
    return [line for each in _sets(args) for line in _survey(args, each)]


def _sets(args: Args) -> Iterable[_Set]:
    if args.prompt_data is not None and not args.has_own_data_source and args.num_rollout != 0:
        keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
        judge = None if args.loss_type == "sft_loss" else args.rm_type
        name = "prompts" if keys.loss_on is None else "examples"
        yield _Set(name, args.prompt_data, keys, PromptFormat.of(args), longest_prompt(args), judge, trains=True)
    for dataset in readable_eval_datasets(args):
        form, longest = PromptFormat.of(dataset), rollout_limits(args).request
        longest = longest if dataset.loss_on is None else longest_prompt(args)
        yield _Set(f"eval {dataset.name}", dataset.path, dataset.keys, form, longest, dataset.rm_type)


def _survey(args: Args, data: _Set) -> Iterable[Line]:
    try:
        paths = data_paths(data.words)
    except DataError:  # a warning of the plan reports it
        return
    if not all(is_file(split_slice(path)[0]) for path in paths):
        return
    total = sum(map(count_rows, paths))
    yield data.name, f"{total:,} rows in {len(paths)} file{'s' if len(paths) > 1 else ''}"
    rows = [row for path in paths for row in islice(read_rows(path, data.keys), SURVEYED) if isinstance(row, Row)]
    part = "" if len(rows) == total else f" (of the first {SURVEYED:,} rows of each file)"
    if data.keys.loss_on is not None:
        yield from _examples(args, data, rows, part)
        return
    try:
        texts, lengths = _tokenized(args, data, rows)
    except ValueError as error:
        yield "", f"prompts not tokenized: {one_line(str(error))}"
    else:
        yield "", f"tokens in a prompt: {_spread(lengths)}{part}"
        yield "", _fits(lengths, data.longest, "to answer")
        if data.trains and args.num_engines > 0 and args.sglang_router_ip is None:
            kept = [length for length in lengths if data.longest is None or length <= data.longest]
            policy = router_policy(args, statistics.mean(kept) if kept else None)
            yield "", f"router: {policy.name}: {policy.why}"
        yield "", f"first prompt: {printable(texts[0], _SHOWN)}"
    if data.keys.label_key is not None:
        yield "", f"first label: {_label_check(args, data, rows[0].data)}"


def _examples(args: Args, data: _Set, rows: Sequence[Row], part: str) -> Iterable[Line]:
    """Yield the lines about examples to learn from: lengths, the share of trained tokens, and the first example."""
    try:
        tokenizer = _tokenizer(args)
        samples = [_example(row, data, tokenizer) for row in rows[:EXAMPLES]]
    except ValueError as error:
        yield "", f"examples not tokenized: {one_line(str(error))}"
        return
    if len(samples) < len(rows):
        part = f" (of the first {len(samples):,} examples)"
    lengths = [len(sample.tokens) for sample in samples]
    yield "", f"tokens in an example: {_spread(lengths)}{part}"
    yield "", _fits(lengths, None if data.longest is None else data.longest + 1, "to learn from")
    trained = sum(map(num_trained, samples))
    yield "", f"trained: {trained:,} of {sum(lengths):,} tokens ({trained / sum(lengths):.1%})"
    yield "", f"first example, trained text in «»: {printable(_marked(samples[0], tokenizer), _SHOWN)}"


def _example(row: Row, data: _Set, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Return the sample that training makes of a row. Raises ValueError with the row's place."""
    keys, form = data.keys, data.form
    conversation = keys.conversation(row.data)
    prompt = form.prompt(keys.prompt(row.data) if conversation is None else conversation)
    sample = Sample(prompt=prompt, label=keys.label(row.data), row=row.data)
    if conversation is None:
        text = prompt_text(row, prompt, form, tokenizer, keys)
        [sample.tokens] = tokenize_prompts(tokenizer, [text], chat_template=form.chat_template)
        sample.prompt_length = len(sample.tokens)
    try:
        fill([sample], tokenizer, keys, form)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return sample


def _marked(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sample's text with marks around what is trained."""
    mask = [0] * sample.prompt_length + list(sample.loss_mask or [1] * sample.response_length)
    text, is_trained = "", False
    pieces = groupby(zip(sample.tokens, mask, strict=True), key=lambda pair: pair[1] > 0)
    for is_trained, pairs in pieces:
        piece = tokenizer.decode([token for token, _ in pairs])
        text += f"«{piece}»" if is_trained else str(piece)
    return text


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return f"median {statistics.median_low(ordered):,}, p99 {p99:,}, max {ordered[-1]:,}"


def _tokenizer(args: Args) -> PreTrainedTokenizerBase:
    if args.hf_checkpoint is None:
        raise ValueError("no --hf-checkpoint is given")
    return cast("PreTrainedTokenizerBase", PlanTokenizer(args.hf_checkpoint))


def _tokenized(args: Args, data: _Set, rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """Return the texts of the rows' prompts and their numbers of tokens."""
    tokenizer = _tokenizer(args)
    form, keys = data.form, data.keys
    texts = [prompt_text(row, form.prompt(keys.prompt(row.data)), form, tokenizer, keys) for row in rows]
    return texts, [len(ids) for ids in tokenize_prompts(tokenizer, texts, chat_template=form.chat_template)]


def _fits(lengths: Sequence[int], longest: int | None, use: str) -> str:
    if longest is None:
        return "no limit of the context is known"
    num_too_long = sum(length > longest for length in lengths)
    if not num_too_long:
        return f"all fit: the context leaves room {use} up to {longest:,} tokens"
    return f"{num_too_long:,} of {len(lengths):,} do not fit and are left out: they have more than {longest:,} tokens"


def _label_check(args: Args, data: _Set, row: Mapping[str, Any]) -> str:
    """Return the label, and the reward of a response that states it."""
    label, metadata = data.keys.label(row) or "", data.keys.metadata(row)
    shown = repr(label if len(label) <= 80 else f"...{label[-77:]}")  # the answer comes last
    judge = metadata.get("rm_type") or data.rm_type
    reward = reward_of(judge) if args.custom_rm_path is None and needs_label(judge) else None
    if reward is None:
        return f"{shown} (not checked: no built-in reward compares with it)"
    scores: list[float] = []
    for response in _statements(label, metadata):
        sample = Sample(label=label, response=response, metadata=dict(metadata), row=dict(row))
        score = find_reward(str(judge))(args, sample)
        scores.append(score.value if isinstance(score, Scored) else score)
    if max(scores) <= reward.lowest:
        return f"{shown}: {judge} gives {max(scores):g} even to a response that states it; check --label-key"
    return f"{shown}: a response that states it gets {max(scores):g} from {judge}"


def _statements(label: str, metadata: Mapping[str, Any]) -> list[str]:
    """Return responses that state the label in the forms that the rewards read."""
    answer = stated_answer(label)
    responses = [label, f"</think>\nAnswer: \\boxed{{{last_boxed(answer) or answer}}}"]
    try:
        responses.append(f"Answer: {right_letter(label, metadata.get('choices'), metadata.get('correct_letter'))}")
    except ValueError:  # it is no label of choices
        return responses
    return responses
