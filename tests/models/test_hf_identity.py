"""A resumed run notices another tokenizer, chat template or config.json, but not another layout of the same content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.models.hf_identity import changes, hf_identity

CONFIG = {"model_type": "glm4", "eos_token_id": [3, 4], "rms_norm_eps": 1e-5, "dtype": "bfloat16", "rope": {"a": 1}}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [{"id": 2, "content": "<x>"}]}
SETTINGS = {"eos_token": "<x>", "chat_template": "{{ messages }}"}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    for name, content in (("config", CONFIG), ("tokenizer", TOKENIZER), ("tokenizer_config", SETTINGS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object], **layout: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, **layout))


def rewritten(hf: Path) -> None:
    """Rewrite the directory as another version of transformers would save it."""
    edit(hf / "config.json", lambda c: c.update(transformers_version="9", _name_or_path="/x", torch_dtype="float32"))
    edit(hf / "config.json", lambda c: c.pop("dtype"), indent=8, sort_keys=True)
    edit(hf / "tokenizer.json", lambda t: t.update(truncation={"max_length": 8}, padding=None), indent=1)
    edit(hf / "tokenizer_config.json", lambda t: t.update(name_or_path="/x", is_local=True, backend="tokenizers"))
    (hf / "chat_template.jinja").write_text(SETTINGS["chat_template"])
    edit(hf / "tokenizer_config.json", lambda t: t.pop("chat_template"), sort_keys=True)


def test_another_layout_is_no_change(hf: Path) -> None:
    before = json.loads(json.dumps(hf_identity(hf)))
    rewritten(hf)
    assert changes(before, hf_identity(hf)) == []


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("config.json", lambda c: c.update(rms_norm_eps=1e-6), "config.json: rms_norm_eps 1e-05 then, 1e-06 now"),
        ("config.json", lambda c: c["rope"].update(a=2), 'config.json: rope {"a": 1} then, {"a": 2} now'),
        ("config.json", lambda c: c.pop("eos_token_id"), "config.json: eos_token_id [3, 4] then, nothing now"),
        ("config.json", lambda c: c.update(new=None), "config.json: new nothing then, null now"),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(a=1, b=0), "another tokenizer"),
        ("tokenizer.json", lambda t: t["added_tokens"].clear(), "another tokenizer"),
        ("tokenizer_config.json", lambda t: t.update(eos_token="b"), "another tokenizer"),
        ("tokenizer_config.json", lambda t: t.update(chat_template="{{ x }}"), "another chat template"),
    ],
)
def test_a_change_is_named(hf: Path, file: str, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    before = hf_identity(hf)
    edit(hf / file, change)
    assert changes(before, hf_identity(hf)) == [expected]
    assert len(changes(before, {})) >= 2 and changes(before, before) == []


def test_tokenizers_of_other_kinds_and_templates_in_files(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (hf / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "merges.txt", "vocab.txt"):
        (hf / name).write_bytes(b"\xffold")
        before = hf_identity(hf)
        (hf / name).write_bytes(b"\xffnew")
        assert changes(before, hf_identity(hf)) == ["another tokenizer"], name
    for name, content in (("chat_template.json", b'{"chat_template": "y"}'), ("chat_template.jinja", b"z")):
        before = hf_identity(hf)
        (hf / name).write_bytes(content)
        assert changes(before, hf_identity(hf)) == ["another chat template"], name
    empty = tmp_path_factory.mktemp("empty")
    shutil.copy(hf / "config.json", empty)
    assert changes(hf_identity(hf), hf_identity(empty)) == ["another tokenizer", "another chat template"]


@pytest.mark.parametrize("garbage", [b"\xff", b"[1]", b"[" * 100_000, b"{"])
def test_a_file_that_cannot_be_read_is_named(hf: Path, garbage: bytes) -> None:
    (hf / "tokenizer.json").write_bytes(garbage)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        hf_identity(hf)
