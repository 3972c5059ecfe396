"""Secrets are replaced in any text, in every form that programs print, and nothing else is replaced."""

from __future__ import annotations

import json
import pickle
from io import StringIO

import pytest

from slime.core.masking import MaskedStream, Masker, mask_urls


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:80/judge", "http://host:80/judge"),
        ("http://host/@me/a:b", "http://host/@me/a:b"),
        ("http://[::1]:80/@me", "http://[::1]:80/@me"),
        ("http://me:pw@host:80/judge", "http://***@host:80/judge"),
        ("https://token@host", "https://***@host"),
        ("redis://:pw@host:1/0", "redis://***@host:1/0"),
        ("http://me:p/w@host/judge", "http://***@host/judge"),
        ("http://me:p@w@host/judge", "http://***@host/judge"),
        ("http://host/judge?token=1&x=2", "http://host/judge?token=***&x=***"),
        ("http://host/judge?token", "http://host/judge?***"),
        ("http://host/judge#token", "http://host/judge#***"),
        ("see 'http://a:b@c/d?e=f', or https://g:h@i", "see 'http://***@c/d?e=***', or https://***@i"),
    ],
)
def test_host_and_path_of_a_url_remain(url: str, shown: str) -> None:
    assert mask_urls(url) == shown


def test_a_secret_is_masked_in_every_form() -> None:
    key, password = 'k"e\\y 7', "p/w äß"
    mask = pickle.loads(
        pickle.dumps(Masker([key, "http://me:p%2Fw%20%C3%A4%C3%9F@host/judge?token=tik+tok&debug=true"]))
    )
    for text in (key, repr(key), json.dumps(key), password, json.dumps(password), "p%2Fw%20%C3%A4%C3%9F", "tik tok"):
        assert mask(f"it was {text}!").strip("'\"") in ("it was ***!", "it was '***'!", 'it was "***"!'), text
    assert mask("true to me at host/judge") == "true to me at host/judge"
    assert Masker(["http://me:p@ss@host/judge"])("it was p@ss, not me") == "it was ***, not me"
    assert Masker(["abc", ""])("abc is short, and a part of many words") == "abc is short, and a part of many words"


def test_a_stream_is_masked_and_otherwise_the_same() -> None:
    inner = StringIO()
    stream = MaskedStream(inner, Masker(["sesame"]))
    assert stream.write("open sesame") == len("open sesame")
    stream.writelines(["sesame\n"])
    assert inner.getvalue() == "open ******\n"
    assert stream.isatty() is False
    stream.close()
    assert inner.closed
