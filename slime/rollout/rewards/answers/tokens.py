r"""Split an answer into tokens: numbers, letters, words, commands and signs.

- Where it sits: `characters.one_spelling` comes before; `expressions` and `structure` read the tokens.
- Invariant: every letter of the text is in exactly one token, with its case. No letter is taken for a unit here, and a
  row of letters that is no product of variables is one word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from slime.rollout.rewards.answers.characters import NEW_ROW
from slime.rollout.rewards.answers.vocabulary import (
    BASE_NAMES,
    CAPITAL_WORDS,
    CONSTANTS,
    CURRENCIES,
    FUNCTIONS,
    UNITS,
    WRITTEN_TOGETHER,
    pairs,
    words,
)

MAX_DIGITS = 2000
"""The most digits of one number: Python converts no longer ones by default, and no answer needs them."""


MAX_BRACKETS = 120


class UnreadError(ValueError):
    """The text is nothing that these modules read, so it is compared as text."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `kind`: number, letter, word, command, sign, open, close or row."""

    kind: str
    text: str
    value: Fraction | None = None
    decimals: int = -1
    """Significant digits of a number that was written with a decimal point; -1 for others."""
    spaced: bool = False
    """Whether a space comes before it."""


_TEXT_COMMANDS = frozenset(words("text textbf textit textrm textsf texttt textup mbox hbox mathrm rm operatorname"))
_STYLES = frozenset(
    words(
        "mathbf boldsymbol bm mathit mathsf mathtt mathnormal ensuremath boxed fbox pmb bold underline emph "
        "mathop mathopen mathclose mathrel"
    )
)
_DECORATIONS = frozenset(
    words("vec overrightarrow hat widehat tilde widetilde bar overline dot ddot mathbb mathcal mathfrak mathscr")
)
_SYNONYMS = pairs(
    """
    dfrac frac tfrac frac cfrac frac leq le leqslant le geq ge geqslant ge neq ne varnothing emptyset lbrace { rbrace }
    lbrack [ rbrack ] lt < gt > dots ldots cdots ldots dotsc ldots dotsb ldots vdots ldots ast times dbinom binom
    tbinom binom degree circ colon : land wedge lor vee implies Rightarrow iff Leftrightarrow
    varphi phi varepsilon epsilon vartheta theta rightarrow to doteq = bigcup cup bigcap cap union cup
    backslash setminus infin infty simeq approx subsetneq subset tg tan
    """
)
_GREEK_LETTERS = frozenset(
    words(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
        "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar partial nabla aleph varsigma"
    )
)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_THOUSANDS = r"[1-9]\d{0,2}(?:(?:%s)\d{3})+(?!\d)"
_SETS_APART = re.compile(_THOUSANDS % r"\{,\}| ")
_COMMAS = re.compile(_THOUSANDS % ",")
_DECIMAL = re.compile(r"\d+(?:\.\d+|\.(?=\\dot|\\overline|\\bar|\(\d))?|\.\d+|\.(?=\\dot|\\overline|\\bar)")
_POWER_OF_TEN = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.A-Za-z])")
_RECURRING = re.compile(
    r"\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))|\((\d+)\)|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?"
)
_REPEATED = re.compile(r"(\d)\1{2,}$")
_BASED = re.compile(
    r"(\(?)(\d[\dA-F]*|[A-F]{2,}[\dA-F]*|[A-F][\dA-F]*(?=_\{16\}))(\)?)_(?:\{\(?(?:\\text\{)?(\d{1,2}|[a-z]+)\}?\)?\}|(\d)(?!\d))"
)
_PREFIXED = re.compile(r"0(?:x[\dA-Fa-f]{1,64}|b[01]{1,200}|o[0-7]{1,90})(?![\dA-Za-z])")
_LETTERS = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*|[A-Za-z]")
_OPEN, _CLOSE = "([{", ")]}"


def significant(text: str) -> int:
    return len(text.replace(".", "").lstrip("0"))


class Tokeniser:
    """Reads one text from left to right."""

    def __init__(self, text: str, letters_are_units: bool = False) -> None:
        self.text = text
        self.position = 0
        self.tokens: list[Token] = []
        self.spaced = False
        self.depth = 0
        self.letters_are_units = letters_are_units
        # A comma may group thousands only where it cannot separate answers.
        bare = re.search(r",(?!\d{3}(?!\d))|,\s", re.sub(r"[({\[].*?[)}\]]", "", text)) is None
        self.commas_in_numbers = bare

    def read(self) -> list[Token]:
        openings = sum(self.text.count(sign) for sign in _OPEN)
        if openings > MAX_BRACKETS:
            raise UnreadError("too many brackets")
        while self.position < len(self.text):
            sign = self.text[self.position]
            if sign == " ":
                self.position += 1
                self.spaced = True
                continue
            before = self.position
            self._one(sign)
            self.spaced = False
            if self.position <= before:
                raise UnreadError(f"stuck at {sign!r}")
        return self.tokens

    def _add(self, kind: str, text: str, value: Fraction | None = None, decimals: int = -1) -> None:
        self.tokens.append(Token(kind, text, value, decimals, self.spaced))
        self.spaced = False

    def _one(self, sign: str) -> None:
        if sign.isascii() and (
            sign.isdigit() or (sign == "." and self.text[self.position + 1 : self.position + 2].isdigit())
        ):
            self._number()
        elif (match := _BASED.match(self.text, self.position)) is not None:
            self._based(match)
        elif sign == "\\":
            self._command()
        elif sign.isalpha():
            self._letters()
        elif sign == NEW_ROW:
            self.position += 1
            self._add("row", sign)
        else:
            self.position += 1
            if sign in _OPEN:
                self.depth += sign != "{"
                self._add("open", "{{" if sign == "{" else sign)
            elif sign in _CLOSE:
                self.depth -= sign != "}"
                self._add("close", "}}" if sign == "}" else sign)
            else:
                self._sign(sign)

    def _sign(self, sign: str) -> None:
        for pair, one in (("<=", "le"), (">=", "ge"), ("!=", "ne"), ("=>", "Rightarrow")):
            if self.text.startswith(pair, self.position - 1) and not self.text.startswith("==", self.position):
                self.position += 1
                self._add("command", one)
                return
        if sign == "*" and self.text.startswith("*", self.position):
            self.position += 1
            sign = "^"
        self._add("sign", sign)

    def _number(self) -> None:
        text, position = self.text, self.position
        start = position
        if match := _BASED.match(text, position):
            self._based(match)
            return
        if match := _PREFIXED.match(text, position):
            self.position = match.end()
            self._add("number", match[0], Fraction(int(match[0], 0)))
            return
        match = _SETS_APART.match(text, position)
        if match is None and self.commas_in_numbers and self.depth == 0:
            match = _COMMAS.match(text, position)
        whole = "" if match is None else match[0]
        position += len(whole)
        if match is None or text[position : position + 1] == ".":
            more = _DECIMAL.match(text, position)
            if more is not None:
                whole += more[0]
                position = more.end()
        digits = re.sub(r"[^\d.]", "", whole)
        if len(digits) > MAX_DIGITS:
            raise UnreadError("a number is too long")
        self.position = position
        value = Fraction(digits + "0" if digits.endswith(".") else "0" + digits)
        if "." in digits:
            value = self._recurring(digits, value)
        elif power := _POWER_OF_TEN.match(text, self.position):
            value = self._scaled(value, power)
        written = text[start : self.position]
        self._add("number", written, value, significant(digits) if "." in digits else -1)

    def _scaled(self, value: Fraction, power: re.Match[str]) -> Fraction:
        self.position = power.end()
        exponent = int(power[1])
        return value * 10**exponent if exponent >= 0 else value / 10**-exponent

    def _recurring(self, digits: str, value: Fraction) -> Fraction:
        r"""Return the value of `0.1\overline{6}`, `0.1(6)`, `0.1\dot6` or `0.1666...`; else of the plain number."""
        places = len(digits.partition(".")[2])
        if power := _POWER_OF_TEN.match(self.text, self.position):
            return self._scaled(value, power)
        match = _RECURRING.match(self.text, self.position)
        if match is not None:
            period = match[1] or match[2] or match[3] or (match[4] + (match[5] or "") + (match[6] or ""))
            self.position = match.end()
            return value + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
        if self.text.startswith(r"\ldots", self.position):
            repeated = _REPEATED.search(digits.partition(".")[2])
            if repeated is None:
                raise UnreadError("a decimal that continues in an unknown way")
            self.position += len(r"\ldots")
            return value + Fraction(int(repeated[1]), 9 * 10**places)
        return value

    def _based(self, match: re.Match[str]) -> None:
        name = match[4] or match[5]
        base = BASE_NAMES.get(name, 0) if name.isalpha() else int(name)
        if bool(match[1]) != bool(match[3]) or not 2 <= base <= 36 or len(match[2]) > 200:
            raise UnreadError("a number with a subscript that is no base")
        try:
            value = int(match[2], base)
        except ValueError as error:
            raise UnreadError("a digit that its base does not have") from error
        self.position = match.end()
        self._add("number", match[0], Fraction(value))

    def _braced(self) -> str | None:
        """Return the content of the group that begins here, or the single sign; the position is after it."""
        while self.text.startswith(" ", self.position):
            self.position += 1
        if not self.text.startswith("{", self.position):
            match = _COMMAND.match(self.text, self.position)
            content = match[0] if match else self.text[self.position : self.position + 1]
            self.position += len(content)
            return content or None
        depth, start = 0, self.position
        for index in range(start, len(self.text)):
            escaped = self.text[index - 1] == "\\"
            depth += {"{": 1, "}": -1}.get(self.text[index], 0) * (not escaped)
            if depth == 0:
                self.position = index + 1
                return self.text[start + 1 : index]
        raise UnreadError("a brace is never closed")

    def _command(self) -> None:
        match = _COMMAND.match(self.text, self.position)
        if match is None:
            raise UnreadError("a backslash at the end")
        self.position = match.end()
        name = _SYNONYMS.get(match[1], match[1])
        if name in _TEXT_COMMANDS:
            self._text(self._braced() or "", name)
        elif name in _STYLES:
            self._inside(self._braced() or "")
        elif name in _DECORATIONS:
            content = (self._braced() or "").replace(" ", "")
            self._add("letter", f"{name}:{content}")
        elif name in ("{", "}"):
            self.depth += 1 if name == "{" else -1
            self._add("open" if name == "{" else "close", name)
        elif name in _GREEK_LETTERS:
            self._add("letter", "\\" + name)
        elif name == "begin" or name == "end":
            kind = self._braced() or ""
            self._add("command", f"{name}:{kind.rstrip('*')}")
            if name == "begin" and kind == "array" and self.text.startswith("{", self.position):
                self._braced()
        elif name in CURRENCIES:
            self._add("word", CURRENCIES[name])
        elif name in ("lvert", "rvert", "vert", "|"):
            self._add("sign", "||" if name == "|" else "|")
        elif len(name) == 1 and not name.isalpha():
            if name in "([":
                self.depth += 1
            self._add("open" if name in "([" else "close" if name in ")]" else "sign", name)
        else:
            self._add("command", name)

    def _inside(self, content: str) -> None:
        """Read a group's content as if it had no wrapping command."""
        inner = Tokeniser(content, self.letters_are_units)
        inner.spaced = self.spaced
        self.tokens += inner.read()
        if not content.strip():
            self.spaced = True

    def _text(self, content: str, name: str) -> None:
        r"""Read the words of \text{...}; numbers and signs in it are read as usual."""
        position, spaced = 0, self.spaced
        inner = Tokeniser("")
        upright = name in ("mathrm", "rm", "operatorname")
        for match in re.finditer(r"\\[A-Za-z]+|[A-Za-z\u00c0-\u024f]+(?:['-][A-Za-z]+)*|[^A-Za-z\\]+|\\.", content):
            piece = match[0]
            spaced = spaced or content[max(position, match.start() - 1) : match.start()] == " "
            if piece[0].isalpha() and piece[0] < "\u0250":
                self.spaced = spaced
                after_number = self._in_unit()
                if piece in FUNCTIONS and upright:
                    self._add("command", piece)
                elif len(piece) == 1 and upright and (piece in "eid" or not (after_number and piece in UNITS)):
                    self._add("letter", piece)
                else:
                    self._add("word", piece)
            else:
                inner = Tokeniser(piece)
                inner.spaced = spaced
                self.tokens += [
                    token if token.kind != "letter" or token.text.startswith("\\") else Token("word", token.text)
                    for token in inner.read()
                ]
            spaced = piece[-1] == " "
        self.spaced = spaced

    def _in_unit(self) -> bool:
        """Return whether a unit may follow here: after a number or bracket, or after a unit with its sign (`m/`)."""
        before = [token for token in self.tokens if token.text not in ("{{", "}}")][-2:]
        if before and before[-1].text in ("/", "cdot", "times", "*") and before[0].kind in ("word", "number"):
            return before[0].kind == "word"
        return bool(before) and before[-1].kind in ("number", "word", "close")

    def _letters(self) -> None:
        match = _LETTERS.match(self.text, self.position)
        if match is None:
            self._foreign()
            return
        run = match[0]
        if not run.isalpha() and len(re.split(r"['-]", run)[0]) < 4:  # a prime or a minus, not a hyphen
            run = re.split(r"['-]", run)[0]
        self.position += len(run)
        after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
        if run in FUNCTIONS:
            self._add("command", run)
        elif run.lower() in CONSTANTS and run != "PI":
            self._add("command", CONSTANTS[run.lower()][1:])
        elif self._is_unit(run, after_number):
            self._add("word", run)
        elif len(run) > 1 and run.isupper():
            self._add("word" if run in CAPITAL_WORDS else "letter", run)
        elif len(run) > 2 and not (run.islower() or run.istitle() or len(run) > 4):
            self._add("letter", run)
        elif is_product(run):
            for letter in run:
                self._add("letter", letter)
        else:
            self._add("word", run)

    def _is_unit(self, run: str, after_number: bool) -> bool:
        if run in ("am", "pm"):
            return after_number
        if self.letters_are_units and self.tokens and self.spaced and run in UNITS:
            return True
        return after_number and (run in WRITTEN_TOGETHER or (self.spaced and len(run) > 1 and run in UNITS))

    def _foreign(self) -> None:
        """Read a run of letters that are not Latin as one word (a Greek letter has become a command before)."""
        end = self.position
        while end < len(self.text) and self.text[end].isalpha() and not self.text[end].isascii():
            end += 1
        self._add("word", self.text[self.position : end])
        self.position = end


_SHORT_WORDS = frozenset(words("or and if is no not for all in of"))


def is_product(run: str) -> bool:
    """Return whether a row of letters is a product of variables (`ab`), not a word or a row of points (`BACD`)."""
    if len(run) == 1:
        return True
    if run in _SHORT_WORDS:
        return False
    if len(run) == 2:
        return True
    if len(run) == 3 and run.islower():
        codes = sorted(map(ord, run))
        in_a_row = [code - codes[0] for code in codes] == [0, 1, 2]
        return in_a_row or not set(run) & set("aeiouy") - {"y"}
    return False


def tokenise(text: str, letters_are_units: bool = False) -> list[Token]:
    """Return the tokens of a text that `one_spelling` has returned.

    Raises:
        UnreadError: unbalanced braces, a number that is too long, or digits that a base does not have.
    """
    return Tokeniser(text, letters_are_units).read()
