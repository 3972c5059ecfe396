"""Masking secrets in text: credentials inside URLs, and secrets that are known by their value.

- Used by: `config.secrets` makes a Masker from a run's arguments; everything that prints, logs or writes text uses it.
- Invariant: masking changes nothing else; a masked URL keeps its scheme, host and path.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 4
"""Characters. A shorter secret occurs inside ordinary words, so it is masked only where its own flag is shown."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>]+")
"""A URL. The scheme's length is bounded; otherwise every letter of a long word would start a scan to its end."""
_PARTS = re.compile(r"([^:]+://)([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_SECRET_NAME = re.compile(r"key|token|pass|pwd|secret|sig|auth|code|cred", re.IGNORECASE)
LONG = 16
"""Characters. A query value of this length or longer counts as a secret, whatever its name is."""


def mask_urls(text: str) -> str:
    """Return `text` with user, password and query values of every URL replaced.

    `http://me:pw@host/judge?token=1&x=2` becomes `http://***@host/judge?token=***&x=***`.
    """
    return _URL.sub(lambda match: _mask_url(match[0]), text) if "://" in text else text


def _mask_url(url: str) -> str:
    match = _PARTS.fullmatch(url)
    assert match is not None, "everything that _URL matches has these parts"
    scheme, authority, path, query, fragment = (part or "" for part in match.groups())
    if "@" not in authority and "@" in path and not re.fullmatch(r"[^:]*(:\d*)?", _after_brackets(authority)):
        end = path.rindex("@") + 1  # the password contains a slash
        authority, path = authority + path[:end], path[end:]
    if "@" in authority:
        authority = f"{HIDDEN}@{authority.rpartition('@')[2]}"
    if query:
        query = "?" + "&".join(_mask_pair(pair) for pair in query[1:].split("&"))
    return scheme + authority + path + query + (f"#{HIDDEN}" if fragment else "")


def _after_brackets(authority: str) -> str:
    """Return HOST:PORT without the address of an IPv6 host, which contains colons itself."""
    return authority.rpartition("]")[2]


def _mask_pair(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}={HIDDEN}" if equals else HIDDEN


class Masker:
    """Replaces the given secrets, and the credentials in any URL. It can be sent to another process."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Take the secrets as whole values; of a URL, only the parts that `mask_urls` hides are secret."""
        texts = {form for secret in secrets for part in _parts(secret) for form in _forms(part)}
        self._texts = sorted((text for text in texts if len(text) >= SHORTEST), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._texts:
            text = text.replace(secret, HIDDEN)
        return mask_urls(text)


def _parts(secret: str) -> Iterator[str]:
    """Yield the strings that must not be printed anywhere."""
    if mask_urls(secret) == secret:
        if "://" not in secret:
            yield secret
        return
    try:
        parts = urlsplit(secret)
    except ValueError:
        yield secret
        return
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    yield password or user
    for name, value in parse_qsl(parts.query):
        if _SECRET_NAME.search(name) or len(value) >= LONG:
            yield value


def _forms(text: str) -> Iterator[str]:
    """Yield `text` as a URL, a header, Python or JSON would show it."""
    for form in (text, unquote(text)):
        yield from (form, quote(form), quote(form, safe=""), repr(form)[1:-1], json.dumps(form)[1:-1])


class MaskedStream:
    """A text stream that masks what is written to it; everything else is passed to the wrapped stream."""

    def __init__(self, stream: TextIO, masker: Masker) -> None:
        self._stream, self._masker = stream, masker

    def write(self, text: str) -> int:
        self._stream.write(self._masker(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_output(masker: Masker) -> None:
    """Mask everything that this process prints through Python from now on, including tracebacks."""
    sys.stdout = cast(TextIO, MaskedStream(sys.stdout, masker))
    sys.stderr = cast(TextIO, MaskedStream(sys.stderr, masker))
