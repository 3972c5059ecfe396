r"""Split tokens into parts: at separators, at brackets, and without text around an answer.

- Called by: `structure` splits an answer with these until only expressions and words are left.
- Invariant: a separator in brackets separates nothing outside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from slime.rollout.rewards.answers.tokens import Token, UnreadError
from slime.rollout.rewards.answers.vocabulary import INTRODUCTIONS

SEPARATORS = frozenset({",", ";"})
SET_OPERATIONS = ("cup", "setminus", "cap")
STRIPPED_SIGNS = frozenset({"=", ":", "approx", "therefore", "Rightarrow", "."})


_PUNCTUATION = frozenset({":", "-", "!", "?", '"', ".", "'"})


def without_punctuation(tokens: list[Token]) -> list[Token]:
    """Return the tokens between two words, without a colon, quotes, or a single sign of punctuation."""
    if all(token.text in _PUNCTUATION for token in tokens):
        return []
    while tokens and tokens[0].text in (":", '"'):
        tokens = tokens[1:]
    while tokens and tokens[-1].text in (".", ":", "?", '"'):
        tokens = tokens[:-1]
    return tokens


def singular(word: str) -> str:
    """Return `solutions` as `solution`; short words and words that end with two s stay."""
    return word[:-1] if len(word) > 4 and word.endswith("s") and not word.endswith("ss") else word


def joined(tokens: Sequence[Token]) -> str:
    """Return the tokens as text without spaces and without braces around one token, so that two spellings are equal."""
    texts = [token.text for token in tokens]
    left_out: set[int] = set()
    for index, (opening, inside, closing) in enumerate(zip(texts, texts[1:], texts[2:], strict=False)):
        long_number = inside.isdigit() and len(inside) > 1  # `x^10` is not `x^{10}`
        if (opening, closing) == ("{{", "}}") and inside not in ("{{", "}}") and not long_number:
            left_out |= {index, index + 2}
    return " ".join(text for index, text in enumerate(texts) if index not in left_out)


def is_separator(token: Token) -> bool:
    if token.kind == "word":
        return token.text.lower() in ("and", "or")
    return (
        token.kind == "row"
        or (token.kind == "command" and token.text in ("wedge", "vee"))
        or (token.kind == "sign" and token.text in SEPARATORS)
    )


def split(tokens: Sequence[Token], separates: Callable[[Token], bool]) -> tuple[list[list[Token]], list[Token]]:
    """Split at the separators outside all brackets; return the parts and the separators."""
    parts: list[list[Token]] = [[]]
    found: list[Token] = []
    depth = 0
    for token in tokens:
        opens = token.kind == "open" or token.text.startswith("begin:") or token.text in ("lfloor", "lceil")
        closes = token.kind == "close" or token.text.startswith("end:") or token.text in ("rfloor", "rceil")
        depth += opens - closes
        if depth < 0:
            raise UnreadError("brackets do not match")
        if depth == 0 and separates(token):
            found.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    if depth:
        raise UnreadError("brackets do not match")
    return parts, found


def closing(tokens: Sequence[Token], start: int) -> int:
    """Return the index of the token that closes the bracket at `start`; -1 if there is none."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += {"open": 1, "close": -1}.get(tokens[index].kind, 0)
        if depth == 0:
            return index
    return -1


def outside(tokens: Sequence[Token], index: int) -> bool:
    return sum({"open": 1, "close": -1}.get(token.kind, 0) for token in tokens[:index]) == 0


def unwrap(tokens: list[Token]) -> list[Token]:
    """Remove braces around the whole."""
    while len(tokens) > 1 and tokens[0].text == "{{" and closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def introduced(tokens: list[Token]) -> list[Token]:
    """Remove "the answer is", "for all x" at the end, a leading = or :, and full stops between words."""
    for introduction in INTRODUCTIONS:
        words = introduction.split()
        if [token.text.lower() for token in tokens[: len(words)]] == words and len(tokens) > len(words):
            tokens = tokens[len(words) :]
            break
    while len(tokens) > 1 and tokens[0].kind in ("sign", "command") and tokens[0].text in STRIPPED_SIGNS:
        tokens = tokens[1:]
    while len(tokens) > 1 and tokens[-1].kind == "sign" and tokens[-1].text in (".", ",", ";", ":"):
        tokens = tokens[:-1]
    for index in range(1, len(tokens) - 1):
        following = tokens[index + 1]
        if (tokens[index].text == "for" and following.text in ("all", "any", "every")) or tokens[
            index
        ].text == "forall":
            return tokens[:index]
    return tokens


def qualifier(tokens: list[Token]) -> list[Token]:
    r"""Turn `k\pi\ (k\in\mathbb{Z})` into `k\pi, k\in\mathbb{Z}`."""
    opening = next((index for index in range(1, len(tokens)) if closing(tokens, index) == len(tokens) - 1), 0)
    if not opening or tokens[opening].text != "(" or tokens[-1].text != ")":
        return tokens
    inside = tokens[opening + 1 : -1]
    if len(inside) < 3 or inside[1].text != "in" or inside[1].kind != "command":
        return tokens
    return [*tokens[:opening], Token("sign", ","), *inside]


def french(tokens: list[Token]) -> list[Token]:
    """Turn the first bracket of `]0,1[` into an opening one and the last into a closing one."""
    read: list[Token] = []
    stack: list[tuple[str, bool]] = []
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else Token("end", "")
        if token.text in (",", ";") and stack:
            stack[-1] = (stack[-1][0], True)
        if token.text == "]" and not stack:
            stack.append(("]", False))
            token = replace(token, kind="open")
        elif token.text == "[" and stack and stack[-1][0] in "[]" and stack[-1][1] and _ends(following):
            stack.pop()
            token = replace(token, kind="close")
        elif token.kind == "open":
            stack.append((token.text, False))
        elif token.kind == "close" and stack:
            stack.pop()
        read.append(token)
    return read


def _ends(token: Token) -> bool:
    return token.kind in ("end", "close", "row", "word") or token.text in (*SET_OPERATIONS, ",", ";")
