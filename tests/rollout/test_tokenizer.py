"""A Hugging Face directory is data: no code in it is imported, and its chat template cannot reach Python."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, Glm4Config, Glm4MoeConfig, PreTrainedTokenizerFast

from slime.config.args import Args
from slime.models.families import FAMILIES
from slime.rollout.chat_template import render_messages
from slime.rollout.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<x>": 2}, unk_token="<x>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<x>").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "glm4"}))
    return tmp_path / "hf"


def with_code(hf: Path, marker: Path) -> None:
    """Make a directory that names code of its own in every possible way, with the code."""
    for name in ("custom", "configuration_custom", "tokenization_custom", "conversion"):
        (hf / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w')\n"
            "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
            "class Custom(PreTrainedTokenizerFast): pass\n"
            "class CustomConfig(PretrainedConfig): model_type = 'custom'\n"
        )
    auto_map = {"AutoTokenizer": ["custom.Custom", "custom.Custom"], "AutoConfig": "configuration_custom.CustomConfig"}
    for name, changes in (
        ("tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "Custom"}),
        ("config.json", {"auto_map": auto_map, "model_type": "custom"}),
    ):
        content = json.loads((hf / name).read_text())
        (hf / name).write_text(json.dumps({**content, **changes}))


def test_code_is_imported_only_with_the_flag(hf: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with_code(hf, marker)
    with pytest.raises(ValueError, match=f"--hf-checkpoint {hf}: no tokenizer can be loaded from it: .*custom code"):
        load_tokenizer(Args(hf_checkpoint=str(hf)))
    assert not marker.exists()
    tokenizer = load_tokenizer(replace(Args(hf_checkpoint=str(hf)), hf_trust_remote_code=True))
    assert marker.exists() and type(tokenizer).__name__ == "Custom", "control: with the flag it is run"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.plain_tokenizer])
def test_a_familys_general_class_is_the_automatic_one(hf: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """A start saves the import of AutoTokenizer if it would choose transformers' general class."""
    config = {"glm4": Glm4Config, "glm4_moe": Glm4MoeConfig}[family]()
    config.save_pretrained(hf)
    expected = AutoTokenizer.from_pretrained(hf)
    monkeypatch.setattr("transformers.AutoTokenizer", None)
    found = load_tokenizer(Args(hf_checkpoint=str(hf)))
    assert (type(found), found.get_vocab()) == (type(expected), expected.get_vocab())
    content = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": ["a.B", "a.B"]}}))
    with pytest.raises(ValueError, match="'NoneType'"):
        load_tokenizer(Args(hf_checkpoint=str(hf)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ messages.append.__self__.__class__ }}{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
        "{{ messages.append(1) }}",
        "{% import 'os' as os %}",
        "{{ messages",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(hf: Path, tmp_path: Path, template: str) -> None:
    marker = tmp_path / "marker"
    (hf / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    tokenizer = load_tokenizer(Args(hf_checkpoint=str(hf)))
    with pytest.raises(ValueError, match=f"--hf-checkpoint {hf}: its chat template cannot be rendered"):
        render_messages(tokenizer, MESSAGES, None)
    assert not marker.exists()
    (hf / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert render_messages(load_tokenizer(Args(hf_checkpoint=str(hf))), MESSAGES, None) == "a!", "control"


class Touches:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._path), "w")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.pkl", "tokenizer_config.json"])
def test_tokenizer_files_are_not_unpickled(hf: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    if name in ("tokenizer.model", "vocab.pkl"):
        (hf / "tokenizer.json").unlink()
    (hf / name).write_bytes(pickle.dumps(Touches(marker)))
    with pytest.raises(ValueError, match=f"--hf-checkpoint {hf}: no tokenizer can be loaded from it"):
        load_tokenizer(Args(hf_checkpoint=str(hf)))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"model": 7}'),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "glm4", "num_hidden_layers": "28"}'),
        ("config.json", ""),
    ],
)
def test_files_of_another_form_are_one_error(hf: Path, name: str, content: str) -> None:
    (hf / name).write_text(content)
    with pytest.raises(ValueError, match=f"--hf-checkpoint {hf}: no tokenizer can be loaded from it"):
        load_tokenizer(Args(hf_checkpoint=str(hf)))
