"""Several turns in one sample: append what the model did not write, and a base class for environments.

- Called by: custom generate functions. `generate` makes each turn of the model.
- Invariant: sampled tokens stay as they are. A token of the environment has loss_mask 0, which keeps it out of the
  loss, the importance weights and every metric over tokens; its log-prob is 0, and its policy version is that of the
  token before it, so that all fields have the same length. Everything that a resumed sample needs is in the sample.

    MODEL says -> env.reply(said) -+-> a text, or messages: appended with loss_mask 0, then the MODEL's next turn
                                   +-> None: the sample is complete

--rollout-max-response-len limits what the model says in all turns together. Prompt, turns and environment together are
limited by --rollout-max-context-len, or else by the model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.config.prompt_format import PromptFormat
from slime.core.columns import Array
from slime.core.sample import MULTI_TURN, Message, Sample, Status
from slime.engine.protocol import SamplingParams
from slime.rollout.chat_template import render_suffix
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample, room
from slime.rollout.token_text import response_text
from slime.rollout.tokenizer import tokenize


def last_turn(sample: Sample, context: RolloutContext, *, skip_special_tokens: bool = True) -> str:
    """Return the text of the model's last turn: the tokens after those of the environment."""
    return context.decode(_turn_tokens(sample), skip_special_tokens=skip_special_tokens)


def _turn_tokens(sample: Sample) -> list[int]:
    mask_R = sample.array("loss_mask")
    of_environment = [] if mask_R is None else np.flatnonzero(mask_R == 0)
    begin = int(of_environment[-1]) + 1 if len(of_environment) else 0
    return sample.response_tokens_R[begin:].tolist()


def append_environment(sample: Sample, text: str, context: RolloutContext) -> bool:
    """Append a text of the environment to the response, and let the model's next turn begin.

    Returns whether there is room for the text and one more token. If not, the sample is TRUNCATED as it is.
    """
    [tokens] = tokenize(context.tokenizer, [text], add_special_tokens=False)
    return _append(sample, tokens, context)


def append_messages(sample: Sample, messages: Sequence[Message], context: RolloutContext) -> bool:
    """Append messages (the user's next turn, a tool's result) as the chat template renders them after an answer.

    The text that ends the model's turn comes first, unless the model wrote it itself; the header of its next answer
    comes last. The prompt has to be messages. `messages_of` returns the whole conversation.

    Returns whether there is room, as `append_environment`.

    Raises:
        ValueError: the prompt is a text, or the chat template fails.
    """
    args = context.args
    conversation = [*messages_of(sample), {"role": "assistant", "content": last_turn(sample, context)}]
    tools = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key).tools(sample.row)
    suffix = render_suffix(
        context.tokenizer, conversation, messages, tools, template_kwargs=PromptFormat.of(args).template_kwargs
    )
    if not _append(sample, suffix.tokens(context.tokenizer, _turn_tokens(sample)), context):
        return False
    _turns(sample)["messages"] = [*conversation[len(_prompt_messages(sample)) :], *messages]
    return True


def messages_of(sample: Sample) -> list[Message]:
    """Return the conversation: the prompt's messages, and those before the model's present turn.

    Raises:
        ValueError: the prompt is a text.
    """
    return [*_prompt_messages(sample), *_turns(sample).get("messages", [])]


def _prompt_messages(sample: Sample) -> list[Message]:
    if isinstance(sample.prompt, str):
        raise ValueError(
            f"sample {sample.index}: its prompt is a text, to which no messages can be appended; add "
            "--apply-chat-template, or append a text with append_environment"
        )
    return sample.prompt


def _turns(sample: Sample) -> dict[str, Any]:
    """Return what is known of the sample's turns, in plain data: `num`, `messages`, and an environment's `state`."""
    return sample.metadata.setdefault(MULTI_TURN, {"num": 1})


def _append(sample: Sample, tokens: list[int], context: RolloutContext) -> bool:
    if room(context.args, sample, sys.maxsize) <= len(tokens):  # the response's limit is for the model's tokens
        sample.status = Status.TRUNCATED
        return False
    count, new = sample.response_length, np.zeros(len(tokens), dtype=np.int8)
    versions_R = _or_filled(sample.array("policy_versions"), count, context.policy_version, "int32")
    version = int(versions_R[-1]) if count else context.policy_version
    tokens_T = np.append(sample.tokens_T, np.array(tokens, dtype=np.int32))
    skips = context.args.rollout_skip_special_tokens
    text = response_text(sample, context.token_text, tokens_T[sample.prompt_length :], skip_special_tokens=skips)
    sample.set_arrays(
        loss_mask=np.append(_or_filled(sample.array("loss_mask"), count, 1, "int8"), new),
        rollout_log_probs=np.append(_or_filled(sample.array("rollout_log_probs"), count, 0.0, "float64"), new),
        policy_versions=np.append(versions_R, np.full(len(tokens), version, dtype=np.int32)),
        tokens=tokens_T,
    )
    sample.response_length += len(tokens)
    sample.set_text(text)
    if count:
        _turns(sample)["num"] += 1
    sample.check()
    return True


def _or_filled(values_R: Array | None, count: int, value: float, dtype: str) -> Array:
    """Return the values, or `count` times `value` where there are none."""
    return np.full(count, value, dtype=dtype) if values_R is None or not len(values_R) else values_R


class MultiTurnEnv:
    """An environment that answers the model after each of its turns.

    A subclass defines `reply`, and its module the function that --custom-generate-function-path names:

        class Guess(MultiTurnEnv):
            def reply(self, said: str) -> str | None:
                self.state["won"] = said == self.sample.label
                return None if self.state["won"] else "wrong, again"

            def reward(self) -> float:
                return float(self.state.get("won", False))

        generate = Guess.generate

    One object lives for one call. A sample that is set aside (an abort, --partial-rollout, a resumed run) comes back to
    a new object, in the same turn: keep what lasts in `self.state`, which is saved with the sample.
    """

    max_turns: ClassVar[int] = 10
    """The model's turns; after the last one, `reply` is called, and its answer is dropped."""
    stop: ClassVar[tuple[str, ...]] = ()
    """Texts that end a turn of the model, in addition to the end of its message."""

    def __init__(self, sample: Sample, context: RolloutContext) -> None:
        self.sample = sample
        self.context = context

    @property
    def state(self) -> dict[str, Any]:
        """The environment's own plain data (JSON types), which stays with the sample."""
        return _turns(self.sample).setdefault("state", {})

    @property
    def turn(self) -> int:
        """The number of the model's present turn, from 1."""
        return _turns(self.sample)["num"]

    def reply(self, said: str) -> Any:
        """Return the answer to what the model said in its turn: a text, messages, or None to end the sample.

        A text becomes the user's next message if the prompt is messages, and is appended as it is otherwise. It may be
        async; one that is cut off is called again, with the same words.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define reply")

    def reward(self) -> float | dict[str, Any] | None:
        """Return the reward of the finished sample, also of a truncated one; None: the run's reward judges it."""
        return None

    @classmethod
    async def generate(
        cls, args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
    ) -> Sample:
        """Alternate the model and the environment, until one of them ends, there is no room, or an abort."""
        env = cls(sample, context)
        params = replace(sampling_params, stop=(*sampling_params.stop_strings, *cls.stop) or None)
        _turns(sample)
        while True:
            await generate_sample(args, sample, params, context)
            if sample.status is not Status.COMPLETED:
                return env._judged(sampling_params)
            sample.status = Status.ABORTED  # what a cancellation leaves, so that the turn is answered later
            try:
                answer = env.reply(last_turn(sample, context))
                if inspect.isawaitable(answer):
                    answer = await answer
            except (Exception, SystemExit):
                sample.status = Status.COMPLETED  # the environment failed; its turn was not cut off
                raise
            sample.status = Status.COMPLETED
            if answer is None or env.turn >= cls.max_turns:
                return env._judged(sampling_params)
            if not env._append(answer):
                return env._judged(sampling_params)

    def _append(self, answer: str | list[Message]) -> bool:
        """Append what `reply` returned; return whether there is room."""
        if not isinstance(answer, str):
            return append_messages(self.sample, answer, self.context)
        if isinstance(self.sample.prompt, str):
            return append_environment(self.sample, answer, self.context)
        return append_messages(self.sample, [{"role": "user", "content": answer}], self.context)

    def _judged(self, params: SamplingParams) -> Sample:
        """Return the sample with its reward, unless it continues later."""
        sample, args = self.sample, self.context.args
        trains = "start_rollout_id" in sample.metadata
        share_is_used = trains and sample.num_sampled >= params.max_new_tokens < args.rollout_max_response_len
        if (
            sample.status is Status.TRUNCATED
            and share_is_used
            and room(args, sample, args.rollout_max_response_len) > 0
        ):
            return sample  # --partial-rollout-max-tokens has cut it off
        if sample.is_finished and sample.reward is None:
            sample.reward = self.reward()
        return sample
