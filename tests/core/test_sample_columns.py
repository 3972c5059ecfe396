"""Samples as columns: every value comes back to the bit and with its type, and nothing else is accepted."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.core.sample import Sample, Status
from slime.core.sample_columns import KINDS, from_columns, to_columns

OLD = Path(__file__).with_name("state_of_format_2.json")
NAN_WITH_A_NOTE = struct.unpack("<d", bytes.fromhex("0100000000ccf87f"))[0]


def exact(value: Any) -> Any:
    """Return `value` with its types and the bits of its floats, so that == means identical."""
    if isinstance(value, Sample):
        return [(each.name, exact(vars(value)[each.name])) for each in fields(Sample)]
    if isinstance(value, list):
        return ["list", *map(exact, value)]
    if isinstance(value, dict):
        return ["dict", *((key, exact(entry)) for key, entry in value.items())]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    return [type(value).__name__, struct.pack("<d", value) if isinstance(value, float) else value]


PLAIN_FLOATS = st.floats(allow_nan=False) | st.just(float("nan"))  # JSON has one nan
FLOATS = st.floats(width=32) | st.floats() | st.just(NAN_WITH_A_NOTE) | st.just(-0.0)
INTS = st.integers(-3, 300) | st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**80), 2**80)
TEXTS = st.text(st.characters(exclude_categories=[]), max_size=6)  # also NUL and lone surrogates
NUMBERS = (
    st.lists(INTS, max_size=4)
    | st.lists(FLOATS, max_size=4)
    | st.lists(st.booleans(), max_size=4)
    | st.lists(INTS | PLAIN_FLOATS | st.booleans(), max_size=4)
)


def array_of(numbers: st.SearchStrategy[Any], dtype: str) -> st.SearchStrategy[Any]:
    """Return arrays as list fields hold them until somebody reads them."""
    return st.lists(numbers, max_size=4).map(lambda values: np.array(values, dtype=dtype))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ROUTES = st.builds(
    lambda dtype, shape: (np.arange(np.prod(shape)) * 7).astype(dtype).reshape(shape),
    st.sampled_from(["u1", "i2", "<i4", ">i4", "i8", "f4"]),
    st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 2)),
)
SAMPLES = st.builds(
    Sample,
    group_index=st.integers(-1, 9),
    index=INTS,
    prompt=TEXTS | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text(max_size=4)), max_size=2),
    label=st.none() | TEXTS,
    tokens=st.lists(st.integers(0, 200_000), max_size=5) | array_of(st.integers(0, 200_000), "i4"),
    response=TEXTS,
    loss_mask=st.none() | NUMBERS | array_of(st.integers(0, 1), "i1") | array_of(st.booleans(), "?"),
    rollout_log_probs=st.none() | NUMBERS | array_of(FLOATS, "f8") | array_of(st.floats(width=32), "f4"),
    policy_versions=st.none() | st.lists(st.integers(0, 400), max_size=5) | array_of(st.integers(0, 400), "i4"),
    routed_experts=st.none() | ROUTES,
    reward=st.none() | PLAIN_FLOATS | st.integers() | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2),
    reward_failure=st.none() | TEXTS,
    status=st.sampled_from(Status),
    metadata=st.dictionaries(st.text(max_size=3), PLAIN, max_size=3),
    row=st.dictionaries(st.text(max_size=3), PLAIN, max_size=3),
)


def native(samples: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """Return the samples with routes in little-endian order, which is how they come back."""
    for sample in (sample for group in samples for sample in group):
        if sample.routed_experts is not None:
            sample.routed_experts = sample.routed_experts.astype(sample.routed_experts.dtype.newbyteorder("<"))
    return [list(group) for group in samples]


@settings(max_examples=100, deadline=None)
@given(groups=st.lists(st.lists(SAMPLES, max_size=3), max_size=3))
def test_every_field_comes_back_exactly(groups: list[list[Sample]]) -> None:
    back = from_columns(to_columns(groups))
    assert [[exact(sample) for sample in group] for group in back] == [
        [exact(sample) for sample in group] for group in native(groups)
    ]


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        ([1, -128], "int", "int8"),
        ([128], "int", "int16"),
        ([151_935], "int", "int32"),
        ([-(2**31) - 1], "int", "int64"),
        ([0.5, float("-inf"), float("nan")], "float", "float32"),
        ([0.1], "float", "float64"),
        ([1e300, 0.5], "float", "float64"),
        ([True, False], "bool", "bool"),
    ],
)
def test_numbers_take_their_smallest_exact_dtype(values: list[Any], kind: str, dtype: str) -> None:
    groups = [[Sample(loss_mask=values), Sample(loss_mask=None), Sample(loss_mask=[])]]
    column = to_columns(groups)["fields"]["loss_mask"]
    assert column[kind].dtype == dtype
    assert [exact(sample) for sample in from_columns({**to_columns(groups)})[0]] == [exact(s) for s in groups[0]]


def test_arrays_come_back_as_arrays() -> None:
    """They take no more room than lists, whatever their own dtype is; a list among them stays a list."""
    first = Sample(tokens=np.array([5, 6], dtype=np.int32), rollout_log_probs=np.array([-0.5]))  # type: ignore
    group = [first, Sample(tokens=[7], rollout_log_probs=np.array([-0.25], dtype=np.float32))]  # type: ignore
    fields = to_columns([group])["fields"]
    assert (fields["tokens"]["numbers"].dtype, fields["tokens"]["int"].dtype) == ("int8", "int8")
    assert [KINDS[kind] for kind in fields["rollout_log_probs"]["kinds"]] == ["numbers", "array"], "two dtypes"
    assert fields["rollout_log_probs"]["numbers"].dtype == "float32"
    [back] = from_columns(to_columns([group]))
    assert [exact(sample) for sample in back] == [exact(sample) for sample in group]
    assert isinstance(vars(back[0])["tokens"], np.ndarray) and isinstance(vars(group[0])["tokens"], np.ndarray)
    assert back[0].array("rollout_log_probs").dtype == np.float64  # type: ignore
    assert (back[0].tokens, back[1].tokens) == ([5, 6], [7])


def test_shared_objects_are_stored_once_and_stay_shared() -> None:
    row, prompt = {"text": "a" * 1000}, [{"role": "user", "content": "b" * 1000}]
    group = [Sample(row=row, prompt=prompt, metadata={"own": 1}) for _ in range(8)]
    columns = to_columns([group])
    assert len(columns["fields"]["row"]["json"]) < 1200
    first, *others = from_columns(columns)[0]
    assert all(other.row is first.row and other.prompt is first.prompt for other in others)
    assert all(other.metadata is not first.metadata for other in others), "equal, but not shared"


def test_columns_share_nothing_with_the_samples() -> None:
    sample = Sample(tokens=[1, 2], metadata={"a": [1]}, routed_experts=np.zeros((1, 1, 2), dtype=np.int32))
    columns = to_columns([[sample]])
    sample.tokens[0] = 9
    sample.metadata["a"].append(2)
    assert sample.routed_experts is not None
    sample.routed_experts[:] = 7
    [[back]] = from_columns(columns)
    assert (back.tokens, back.metadata) == ([1, 2], {"a": [1]})
    assert back.routed_experts is not None and back.routed_experts.base is not columns["fields"]["routed_experts"]
    assert back.routed_experts.tolist() == [[[0, 0]]]


@pytest.mark.parametrize("value", [{1, 2}, object(), np.array([object()]), np.float32(1.0), [np.int64(3)]])
def test_what_is_not_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"not JSON serializable|cannot be stored"):
        to_columns([[Sample(reward=value)]])


def stored() -> dict[str, Any]:
    routes = np.arange(4, dtype=np.uint8).reshape(2, 1, 2)
    first = Sample(tokens=[1, 2, 3], response="é", routed_experts=routes)
    first.set_arrays(policy_versions=np.array([7], dtype=np.int32))
    return to_columns([[first, Sample(tokens=[4])], [Sample()]])


def as_json(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


TOKENS, ROUTED, VERSIONS = ("fields", "tokens"), ("fields", "routed_experts"), ("fields", "policy_versions")
DAMAGE: list[tuple[tuple[str, ...], Any, str]] = [
    (("group_sizes",), np.array([2, 2]), "4 in groups, but columns of"),
    (("group_sizes",), np.array([4, -1]), "group_sizes: ValueError: sizes have to be whole numbers"),
    (("group_sizes",), np.array([3.0]), "sizes have to be whole numbers"),
    ((*TOKENS, "lengths"), np.array([3, 2, 0]), "tokens: ValueError: its values do not have the length"),
    ((*TOKENS, "lengths"), np.array([3, 0, 0]), "tokens: ValueError: its values do not have the length"),
    ((*TOKENS, "lengths"), np.array([4, 2**62, 0]), "tokens: ValueError: its values do not have the length"),
    ((*TOKENS, "lengths"), np.array([3, 1]), "kinds and lengths do not fit together"),
    ((*TOKENS, "kinds"), np.array([2, 2, 7], dtype=np.uint8), "kinds and lengths do not fit together"),
    ((*TOKENS, "kinds"), np.array([2, 2, 3], dtype=np.uint8), "tokens: KeyError: 'float'"),
    ((*TOKENS, "kinds"), np.array([2, 2, 0], dtype=np.uint8), "tokens: ValueError: its values do not have the length"),
    ((*TOKENS, "int"), np.array([1.0, 2.0, 3.0, 4.0]), "its int values are float64"),
    ((*TOKENS, "int"), np.array([[1, 2, 3, 4]]), r"its int values are int64 of shape \[1, 4\]"),
    ((*TOKENS, "json"), as_json({"values": [5], "which": [0]}), "its values do not have the length"),
    (
        ("fields", "row", "json"),
        as_json({"values": [{}], "which": [0, -1, 0]}),
        "row: ValueError: its JSON has no such",
    ),
    (("fields", "row", "json"), np.frombuffer(b"[" * 100_000, dtype=np.uint8), "row: RecursionError"),
    (("fields", "response", "text"), np.array([0xC3, 0x28], dtype=np.uint8), "response: UnicodeDecodeError"),
    ((*ROUTED, "json"), as_json({"values": [{"dtype": "O", "shape": [2]}, None], "which": [0, 1, 1]}), "dtype O"),
    ((*ROUTED, "json"), as_json({"values": [{"dtype": "<i4", "shape": [4]}, None], "which": [0, 1, 1]}), "4 bytes"),
    ((*ROUTED, "json"), as_json({"values": [{"dtype": "|u1", "shape": [-4]}, None], "which": [0, 1, 1]}), "shape"),
    ((*ROUTED, "json"), as_json({"values": [None], "which": [0, 0, 0]}), "routed_experts: TypeError"),
    ((*VERSIONS, "numbers_like"), np.zeros(0, dtype=np.bool_), "policy_versions: TypeError: Cannot cast"),
    ((*VERSIONS, "numbers"), np.array([2**40]), "policy_versions: TypeError: Cannot cast"),
    ((*VERSIONS, "numbers"), np.array([1], dtype=np.uint8), "its numbers values are uint8"),
]


@pytest.mark.parametrize(("path", "array", "text"), DAMAGE)
def test_arrays_that_do_not_fit_are_refused(path: tuple[str, ...], array: Any, text: str) -> None:
    state = stored()
    assert from_columns(state)[0][1].tokens == [4], "control"
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = array
    with pytest.raises(ValueError, match=f"the stored samples cannot be read: .*{text}"):
        from_columns(state)


def test_an_unknown_field_is_refused_by_name() -> None:
    state = stored()
    state["fields"]["tokenz"] = state["fields"]["tokens"]
    with pytest.raises(ValueError, match=r"not fields of Sample: \['tokenz'\]"):
        from_columns(state)
    del state["fields"]["tokenz"], state["fields"]["label"]
    assert from_columns(state)[1][0].label is None, "a field that is newer than the checkpoint has its default"


def test_every_kind_occurs_in_the_tests() -> None:
    columns = to_columns([[Sample(tokens=[1], loss_mask=[0.5], rollout_log_probs=[True])]] * 2)["fields"]  # type: ignore
    columns |= {name: stored()["fields"][name] for name in ("routed_experts", "policy_versions")}
    assert {KINDS[kind] for column in columns.values() for kind in column["kinds"]} == set(KINDS)


def test_samples_of_an_earlier_checkpoint_are_read() -> None:
    """The file was written by the version before, with lists of dicts."""
    rollout = json.loads(OLD.read_text())["state"]["rollout"]
    source = rollout["data_source"]
    row = {"prompt": "3+4=", "answer": "7", "more": [1, {"a": None}]}
    [[partial, empty]] = from_columns(source["source"]["buffer"])
    assert exact(partial) == exact(
        Sample(
            group_index=4,
            index=8,
            prompt="3+4=",
            label="7",
            tokens=[5, 6, 7, 900, 151000],
            prompt_length=3,
            response="7 \ud83dé\x00",
            response_length=2,
            rollout_log_probs=[-0.1, float("-inf")],
            policy_versions=[2, 3],
            status=Status.ABORTED,
            metadata={"level": 2, "start_rollout_id": 3},
            row=row,
        )
    )
    assert (empty.loss_mask, empty.rollout_log_probs, empty.reward) == ([], [], None)
    [[done, failed]] = from_columns(source["in_flight"])
    assert exact(done.rollout_log_probs) == exact([-1e-300, -0.0]) and done.status is Status.COMPLETED
    assert exact(done.routed_experts) == exact(np.arange(6, dtype=np.int32).reshape(3, 1, 2))
    assert exact(done.reward) == exact({"score": float("nan"), "why": ["x"]})
    assert (failed.loss_mask, failed.status, failed.reward_failure) == ([0.25], Status.FAILED, "timeout")
    for groups in (source["source"]["buffer"], source["in_flight"], rollout["made"]["groups"]):
        samples = from_columns(groups)
        assert [[exact(s) for s in group] for group in from_columns(to_columns(samples))] == [
            [exact(s) for s in group] for group in samples
        ]
