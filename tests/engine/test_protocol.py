from __future__ import annotations

from typing import Any

import pytest

from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams, UpdateWeightsFromDistributed

# The request that sglang-router 0.3.2 sends on (captured from the connection).
FROM_ROUTER: dict[str, Any] = {
    "model": None,
    "input_ids": [1, 2, 3],
    "sampling_params": {"temperature": 0.8, "max_new_tokens": 7, "top_p": 0.9, "top_k": -1, "sampling_seed": 99},
    "return_logprob": True,
    "return_text_in_logprobs": False,
    "stream": False,
    "log_metrics": True,
    "return_hidden_states": False,
    "background": False,
    "no_logs": False,
    "return_bytes": False,
    "return_entropy": False,
    "rid": "r1",
}


def test_a_request_survives_json() -> None:
    request = GenerateRequest(
        input_ids=[1, 2], sampling_params=SamplingParams(temperature=0.5, stop=("a",), stop_token_ids=[3]), rid="x"
    )
    assert GenerateRequest.from_json(request.to_json()) == request


def test_fields_that_the_router_adds_are_accepted() -> None:
    request = GenerateRequest.from_json(FROM_ROUTER)
    assert (request.rid, request.input_ids, request.sampling_params.sampling_seed) == ("r1", [1, 2, 3], 99)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"stream": True}, "stream"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids"),
        ({"input_ids": None}, "input_ids"),
        ({"sampling_params": {"temprature": 1}}, "temprature"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"top_k": 0}}, "top_k"),
        ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"sampling_params": {"n": 2}}, "n is 2"),
        ({"sampling_params": {"stop": [1]}}, "stop"),
        ({"sampling_params": {"sampling_seed": -1}}, "sampling_seed"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GenerateRequest.from_json({**FROM_ROUTER, **change})


def test_a_response_with_contradicting_parts_is_refused() -> None:
    meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 1, "completion_tokens": 2, "weight_version": "3"}
    meta["output_token_logprobs"] = [[-0.5, 4, None], [-0.25, 5, None]]
    response = GenerateResponse.from_json({"output_ids": [4, 5], "text": "", "meta_info": meta})
    assert (response.output_ids, response.log_probs, response.weight_version) == ([4, 5], [-0.5, -0.25], "3")
    with pytest.raises(ValueError, match="different tokens"):
        GenerateResponse.from_json({"output_ids": [4, 6], "text": "", "meta_info": meta})


def test_a_request_that_is_aborted_before_it_runs() -> None:
    """SGLang answers this for a request that was still in its queue."""
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    meta = {"id": "a", "finish_reason": reason, "weight_version": "3", "e2e_latency": 0.1, "completion_tokens": 0}
    meta["output_token_logprobs"] = []
    response = GenerateResponse.from_json({"output_ids": [], "text": "", "meta_info": meta})
    assert (response.finish_reason, response.output_ids, response.log_probs) == ("abort", [], [])


def test_a_bucket_has_as_many_shapes_as_names() -> None:
    with pytest.raises(ValueError, match="2 names, 1 dtypes"):
        UpdateWeightsFromDistributed(names=["a", "b"], dtypes=["float32"], shapes=[[1], [1]])
