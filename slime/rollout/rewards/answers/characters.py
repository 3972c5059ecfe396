r"""Convert each mathematical sign to one spelling: Unicode becomes LaTeX, and wrapping around an answer is removed.

- Where it sits: the first step of reading an answer; `tokens` reads what this returns.
- Invariant: letters keep their case, and no letter, digit or sign that carries meaning is dropped.
"""

from __future__ import annotations

import re
import unicodedata

from slime.rollout.rewards.answers.vocabulary import pairs, words

NEW_ROW = "\x1e"
"""Replaces LaTeX's double backslash, so that no other rule takes its second half for the start of a command."""

_SMALL_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau "
    "upsilon phi chi psi omega"
)
_SIGNS = pairs(
    r"""
    ϕ \phi ϵ \epsilon ϑ \theta Ω \Omega µ \mu ∆ \Delta ≤ \le ⩽ \le ≥ \ge ⩾ \ge ≠ \ne ≈ \approx ≡ \equiv
    × \times · \cdot ⋅ \cdot ∙ \cdot ∗ * ÷ \div ± \pm ∓ \mp ∞ \infty ∪ \cup ∩ \cap ∅ \emptyset ∈ \in ∉ \notin
    ⊂ \subset ⊆ \subseteq ∖ \setminus → \to ∠ \angle △ \triangle ⊥ \perp ∥ \parallel ∣ \mid ∧ \land ∨ \lor
    ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} ℂ \mathbb{C} ° ^{\circ} º ^{\circ} ℃ ^{\circ}\text{C}
    ∑ \sum ∏ \prod ∫ \int … \ldots ⋯ \cdots ′ ' ’ ' ‘ ' “ " ” " ∀ \forall − - – - — - ‐ - ‑ - ⁄ / ∕ / 、 , 。 . ∶ :
    ⟨ \langle ⟩ \rangle ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil € \euro £ \pounds ¥ \yen ₹ \rupee
    ∛ \sqrt[3] ∜ \sqrt[4] √ \sqrt ⇒ \Rightarrow ⇔ \Leftrightarrow
    """
)
for _index, _name in enumerate(_SMALL_GREEK):
    _SIGNS[chr(0x3B1 + _index)] = "\\" + _name
    if _name != "varsigma":
        _SIGNS[chr(0x391 + _index)] = "\\" + _name.capitalize()
_SIGNS = {sign: latex + " " * latex[-1].isalpha() for sign, latex in _SIGNS.items()}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₖ", "0123456789+-()nk", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")
_OVERLINE = re.compile("((?:\\d\u0305)+)")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_SPACES = re.compile(
    r"\\[,;:!> \n]|\\q?quad(?![A-Za-z])|\\h?space\*?\{[^{}]*\}|\\(?:thin|med|thick|neg|en)space|~|[\t\r\n]"
)
_NO_MEANING = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|left(?=[.])[.]|right(?=[.])[.]|left|right|middle|"
    r"[bB]igg?[lrm]?|boldmath|bf|it|rm|sf|tt|normalsize|large|Large|huge|small|centering|noindent|phantom\{[^{}]*\}|"
    r"(?:tag|label)\*?\{[^{}]*\}|(?:color|vspace)\*?\{[^{}]*\})(?![A-Za-z])"
)
_COLOURED = re.compile(r"\\(?:textcolor|colorbox)\{[^{}]*\}")
_ENDING = re.compile(rf"[{NEW_ROW}.,;:]$")
_ORDINAL = re.compile(
    r"(?<=\d)\s*(?:\^\s*)?(?:\{\s*)?(?:\\(?:text|mathrm|textrm|textsuperscript)\s*\{\s*)?(?:st|nd|rd|th)\b\s*\}{0,2}"
)
"""`5th`, `5^{th}`, `5^{\\text{th}}`: the ending has no meaning of its own."""
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.\s?m\b\.?")
_MODULUS = re.compile(r"\(\s*\\?(?:bmod|mod)\s*\{?\s*(\d+)\s*\}?\s*\)")
_DOTS = re.compile(r"\.\s?\.\s?\.")
_EMPHASIS = re.compile(r"(\*\*|__|`+)(.+)\1")


def one_spelling(text: str) -> str:
    r"""Return the text with LaTeX for Unicode signs (`½` is `\frac{1}{2}`), and without math delimiters and spacing."""
    text = _INVISIBLE.sub("", text)
    text = _OVERLINE.sub(lambda match: rf"\overline{{{match[1].replace(chr(0x305), '')}}}", text)
    text = _RAISED.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[sign] for sign in match[0]) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[sign] for sign in match[0]) + "}", text)
    text = "".join(_SIGNS.get(sign) or _compatible(sign) for sign in text)
    return _unwrapped(text)


def _compatible(sign: str) -> str:
    """Return a full-width or mathematical-alphabet sign as plain text, a vulgar fraction as LaTeX, others unchanged."""
    if sign.isascii():
        return sign
    plain = unicodedata.normalize("NFKC", sign)
    if "\u2044" in plain:
        above, below = plain.split("\u2044")
        return rf"\frac{{{above}}}{{{below}}}" if below else sign
    return "".join(_SIGNS.get(part, part) for part in plain)


def _unwrapped(text: str) -> str:
    """Remove wrapping: dollar signs in pairs, colours, labels, emphasis, a full stop at the end."""
    text = _COLOURED.sub("", text.replace("\\\\", NEW_ROW))
    text = text.replace(r"\$", r"\dollar ").replace(r"\%", "%").replace(r"\&", r"\text{ and }").replace(r"\#", "#")
    if text.count("$") % 2 and not text.startswith("$$"):
        text = text.replace("$", r"\dollar ", 1)
    text = re.sub(r"\$+", " ", text)
    text = _DOTS.sub(r"\\ldots ", _DELIMITERS.sub(" ", text))
    text = _NO_MEANING.sub(" ", text)
    text = _ORDINAL.sub(_ordinal, text)
    emphasised = _EMPHASIS.fullmatch(text.strip())
    text = emphasised[2] if emphasised else text
    text = _SPACES.sub(_space, text).strip()
    text = _MODULUS.sub(r"\\pmod{\1}", _HALF_OF_DAY.sub(r"\1m", text))
    while _ENDING.search(text) or text.endswith("\\"):
        text = text[:-1].rstrip()
    return text


def _ordinal(match: re.Match[str]) -> str:
    """Return nothing if the braces in the match are balanced, else the text unchanged."""
    return "" if match[0].count("{") == match[0].count("}") else match[0]


def _space(match: re.Match[str]) -> str:
    return "" if match[0] == r"\!" else " "
