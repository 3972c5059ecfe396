"""SFT's evaluation sets become rows like those of training."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from chat_styles import chat_tokenizer

from slime.config.args import SFT_ROLLOUT, Args
from slime.rollout.validation_sets import validation_sets

USER = {"role": "user", "content": "q"}
TALK = [USER, {"role": "assistant", "content": "aa"}]
LONG = [USER, {"role": "assistant", "content": "a" * 40}]


def sft(*sets: str, **kwargs: object) -> Args:
    shared = Args(
        loss_type="sft_loss",
        rollout_function_path=SFT_ROLLOUT,
        rollout_num_gpus=0,
        apply_chat_template=True,
        eval_prompt_data=sets,
        eval_input_key="messages",
        eval_temperature=1.0,
        eval_top_p=1.0,
        eval_top_k=0,
        eval_max_response_len=1,
        rollout_max_context_len=20,
    )
    return Args(**{**vars(shared), **kwargs})


def test_each_set_has_the_rows_of_training(data_file: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    first = data_file([{"messages": TALK}, {"messages": LONG}, {"messages": TALK}], "first.jsonl")
    second = data_file([{"messages": "q", "answer": "a"}, {"messages": [USER], "answer": TALK[1:]}], "second.jsonl")
    with caplog.at_level(logging.WARNING):
        [batch] = validation_sets(sft("first", first), chat_tokenizer("roles")).values()
    assert batch.total_lengths_N.tolist() == [10, 10]
    assert batch.columns["loss_mask"].tolist() == [1, 1, 1, 1] * 2, "line end, aa, end of turn"
    assert "first" in caplog.text and "1 of 3 examples left out" in caplog.text
    sets = validation_sets(sft("text", second, eval_label_key="answer"), chat_tokenizer("roles"))
    assert list(sets) == ["text"]
    assert sets["text"].response_lengths_N.tolist() == [2, 4]


def test_a_set_without_fitting_examples_fails(data_file: Callable[..., str]) -> None:
    path = data_file([{"messages": LONG}])
    with pytest.raises(ValueError, match=r"evaluation set long .*no example fits into the context of 20 tokens"):
        validation_sets(sft("long", path), chat_tokenizer("roles"))
