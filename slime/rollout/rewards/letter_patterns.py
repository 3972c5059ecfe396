r"""Patterns of the text around an answer's letter: statements, judgements and choices.

- Used by: `letters` searches for them.
- Invariant: each pattern takes time in proportion to what it reads, and repeats are limited.
"""

from __future__ import annotations

import re
import unicodedata

VARIANTS = (range(0xFF01, 0xFF5F), range(0x249C, 0x24EA), range(0x1D400, 0x1D6A4), range(0x1F110, 0x1F12A))
SPELLING = {code: unicodedata.normalize("NFKC", chr(code)) for codes in VARIANTS for code in codes}
SPELLING |= dict.fromkeys(map(ord, "✅✔☑✓👉➡\ufe0f"), "")
"""Translates full-width signs and letters that are circled, bracketed or bold to plain ones, and removes ticks."""

LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
CAPITAL = re.compile("[A-J]")
SMALL = re.compile(r"(?:\(|\b[Oo]ption \(?|\b[Cc]hoice \(?)([a-hj])(?![A-Za-z])")
"""A small letter that belongs to a choice, such as "option b"."""

COMMANDS = (
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathbf|mathrm|mathsf|boldsymbol|bm|rm|bf|emph|underline|[Ll]arge|LARGE"
    r"|[Hh]uge)\b"
)
OPEN = rf"(?:[\s*_$({{\[\"'`“‘「【]|{COMMANDS}|\\[(\[,;:! ]){{0,12}}"
"""Text that may precede a letter: bold, brackets, quotes, LaTeX."""
SHUT = r"(?:[*_$)}\]\"'`”’」】]|\\[)\]]){0,8}"
LETTER = re.compile(rf"{OPEN}(?P<letter>[A-Ja-j])")
QUOTED = re.compile(r"['’‘][\w\s(]{0,12}$")
END = re.compile(rf"{SHUT}[ \t]*(?:[.,;:!。，；！]|\n|$|</)")
SENTENCE_END = re.compile(rf"{SHUT}[ \t]*[.!。]?{SHUT}[ \t]*(?:\n|$|(?<=[.!。])[ \t])")

PART = re.compile(
    r"[A-Za-z0-9]|_+[A-Za-z0-9{\\]|\*[A-Za-z0-9]|['’][A-Za-z]|[-–‑]|\(|:[A-Za-z0-9]|%|/\s*[a-z0-9]"
    rf"|\.[ \t]?(?:coli|elegans|subtilis|thaliana|melanogaster|albicans|difficile|botulinum|rerio)\b"
    rf"|{SHUT}\s*(?:[=+^>×·÷≤≥≈≠−∩∪⊂⊃⊆∈⁺⁻⁰-⁹²³¹₀-₉]|<(?!/)|\\(?![)\]\\,;:! ]|q?quad|text))"
)
"""If this follows a letter, the letter is part of a word, a name or a formula."""
NEXT_WORD = re.compile(r"[ \t]+([A-Za-z]+)")
WORDS_AFTER = re.compile(
    "because|since|as|is|was|which|with|for|and|or|nor|due|given|so|by|in|from|where|that|on|after|when|based|see|to|are"
    "|according|not|rather|instead|but|here|then|only|at|also|among|therefore|thus|hence|again"
)
"""Words that may follow an answer's letter. Other words make it a part of the phrase: "A good reason", "B cells"."""
DENIED = re.compile(
    rf"{SHUT}(?:\s+(?:(?:is|was|are|seems|looks|must be|can be)\s+(?:\w+\s+)?(?:not|wrong|incorrect|false|invalid|"
    r"excluded|eliminated|impossible|ruled)\b|(?:is|was|does|can|could|would)n['’]t\b|can\s?not\b)"
    r"|\s*(?:选项)?(?:是|为)?[错不误]|\s*\?|,?\s+(?:only\s+)?(?:if|unless|provided|assuming)\b"
    r"|,?\s+where\s+[A-J]\s+(?:is|denotes)\b)"
)
"""Text after a letter that denies it: "B is wrong", "B?", "B if x > 0"."""
OTHER = (
    r"(?i:(?:is it|i think|i believe|also|possibly|maybe|perhaps|even|both|either|option|choice|answer)\s+){0,3}"
    rf"{OPEN}"
    r"(?:(?:[B-HJ]|A(?![ \t]+[a-z])|I(?![ \t]+[a-z]))|[a-j](?=[\s\"')\]}*]*(?:[.,;:!]|\n|$)))"
    rf"(?![A-Za-z0-9_(]|['’-][A-Za-z0-9]|\.[ \t]?[a-z]|{SHUT}\s*[=+^])"
)
NO_SUBJECT = r"(?!\W{0,6}(?:is|are|was|were|has|does|cannot|can|would|fails|violates)\b)"
SECOND = re.compile(
    rf"{SHUT}\s*(?:"
    rf"(?:[,;/&、，|(:]\s*)?(?:(?:\bor|\bnor|\band/or)\b|或)\s*{OTHER}"
    rf"|(?:[,;/&、，|:]\s*(?:\band\s+)?|,?\s*(?:\band|\bas well as|\bplus|\btogether with)\b\s*"
    rf"|\b(?:to|through)\s+|[和与及])\s*{OTHER}{NO_SUBJECT}"
    rf"|[ \t](?=[A-J]\W*(?:\n|$)){OTHER})"
)
"""A second letter after the first: "B or C", "A, B", "B (or C)"."""

NOUN = (
    r"(?<![A-Za-z/])(?:(?:answer|ans|option|choice|pick|guess|selection|verdict|conclusion|response|solution|result)"
    r"|(?:correct|right|best|true|accurate|appropriate|plausible)\s+(?:statement|one|alternative|match|structure|product)"
    r"|letter)"
)
COPULA = (
    r"(?:,?\s+(?:to|for|of|among|from|in|on|out|here|therefore|thus|then|hence|given|that|i|we)\b[^.:;?!\n]{0,60}?)?"
    r",?\s+(?:is|was|corresponds to|comes out (?:to be|as)"
    r"|(?:would|should|must|will|has to|ought to|seems to|appears to|turns out to) be)\b"
)
FILL = (
    r"(?:[\s*_,\"'(]{0,4}(?:therefore|thus|hence|then|clearly|definitely|indeed|simply|actually|probably|likely|most"
    r"|obviously|certainly|surely|precisely|exactly|of course|either|both|option|choice|letter|answer|statement|the"
    r"|correct|best|right|one|is)(?![A-Za-z])){0,4}\s*[:–—-]?"
)
NOUNS = (
    "ans", "option", "choice", "pick", "guess", "selection", "verdict", "conclusion", "response", "solution",
    "result", "letter", "correct", "right", "best", "true", "accurate", "appropriate", "plausible",
)  # fmt: skip
STATED = (
    (
        NOUNS,
        re.compile(
            rf"{NOUN}[*_\"'`)}}]{{0,6}}(?:\s*(?:[-=]>|[:=]|→|⇒|>|\])|\s+[-–—]{{1,2}}\s|{COPULA}){FILL}",
            re.IGNORECASE,
        ),
    ),
    (
        ("ans.", "correct", "final"),
        re.compile(r"(?<![A-Za-z])(?:ans\.|correct\s*:|final\s*[:>])\s*", re.IGNORECASE),
    ),
    (
        ("答", "选项", "正解"),
        re.compile(
            r"(?:答案?|选项|正解)\s*(?:应该|应当|应|就)?\s*(?:[:】\]]|是|为|は|选择|选)\s*(?:选项|选择|选|为|是)?\s*:?"
        ),
    ),
    (("正确的是",), re.compile(r"正确的是\s*(?:选项)?")),
)
"""Words that begin a statement of the answer, and a pattern that begins with one of them."""
STATED_WITH_END = (
    (
        ("cho", "select", "pick", "go", "went", "opt", "settle", "vote"),
        re.compile(
            r"(?<![A-Za-z])(?:cho(?:ose|osing|sen|se)|select(?:ed|ing)?|pick(?:ed|ing)?|(?:go|going|went) (?:with|for)"
            r"|opt(?:ed)? for|settled? on|vote for)(?![A-Za-z])"
            r"(?:\s+(?:the|option|choice|answer|letter)(?![A-Za-z])){0,3}\s*:?",
            re.IGNORECASE,
        ),
    ),
    (NOUNS, re.compile(rf"{NOUN}[ \t*_#:]{{0,6}}\n", re.IGNORECASE)),
    (("选",), re.compile(r"选(?:择|取|定)?\s*(?:选项|答案)?\s*:?")),
)
"""After these statements the letter has to end the sentence, or a reason has to follow."""
REASON = re.compile(rf"{SHUT}[ \t]*(?:\)|[-–—]\s|(?:because|since|as|for|due|given|here)\b)")
NOT_STATED = re.compile(
    r"(?:(?:\b(?:if|unless|whether|suppose|supposing|assume|assuming|imagine|doubt|not true|not the case"
    r"|not (?:think|believe|say|mean))|n['’]t (?:think|believe|say|mean)"
    r"|\b(?:might|may|could|many|some|people|students|they)\s+(?:think|believe|say|claim|assume|argue))"
    r"(?:\s+that)?\s+(?:the\s+)?(?:\w+\s+)?)$",
    re.IGNORECASE,
)
NOT_THE_ANSWER = re.compile(
    r"\b(?:wrong|incorrect|false|worst|worse|bad|inferior|excluded|eliminated|rejected|second|second-best|next|other"
    r"|another|possible|previous|first|initial|common|tempting|popular|your|his|her|their|user['’]s|student['’]s|one)\s+$",
    re.IGNORECASE,
)
ANOTHER_ANSWER = re.compile(
    r"\b(?:students|people|many|first|initially|earlier|wrong|incorrect|gave|thought|other|rejected|not|never|cannot)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
"""Words inside a statement that make it another answer: "the answer that many give is B"."""
NOT_CHOSEN = re.compile(
    r"(?:n['’]t|\b(?:not|never|nor|cannot|why|if|when|would have|was going to|instead of|rather than|could"
    r"|might|may|how|they|he|she|everyone|who|many|some|most|students|people|almost|nearly|first|initially"
    r"|(?<!going )(?<!have )(?<!want )(?<!has )to))\s+(?:\w+\s+){0,2}$|(?:不|别|勿|没|非|无法|是否)[^\s,.。]{0,2}$",
    re.IGNORECASE,
)
DOUBLE_BRACKETS = re.compile(r"\[\[\s*([A-J])\s*\]\]")

JUDGED = re.compile(
    rf"(?<![A-Za-z0-9_\\^'’-])(?P<letter>[A-HJa-hj]){SHUT}(?i:,?\s+(?:is|must be|has to be|would be|should be)\s+"
    r"(?:(?P<also>also|equally|too)\s+)?(?:(?:therefore|thus|hence|clearly|indeed|definitely|obviously|certainly"
    r"|probably|likely|the|my|final|most|only|single|best|fully|actually)\s+){0,5}"
    r"(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one|response|match|fit|statement))?|answer|choice|option)"
    rf"{SHUT}(?:[ \t]*(?:[.,;:!)<—–]|\n|$|-\s|\()"
    r"|\s+(?:because|since|as|here|for|to th(?:e|is)|among|given|due|and|so)\b)"
    r"(?!\s*(?:but|if|only|provided|when|assuming|so is|so are)\b))"
)
JUDGED_CHINESE = re.compile(
    r"(?<![A-Za-z0-9])(?P<letter>[A-J])\s*(?:选项|项)?\s*(?:是|为)?(?:正确|对的|正解|对(?=[。，,.!]|$))"
)
CLAUSE = re.compile(
    r"[.!?\n;,:。，；：]|\b(?:but|and|while|whereas|so|hence|thus|therefore|because|since|that)\b", re.IGNORECASE
)
LEAD = re.compile(
    r"\W*(?:(?:then|consequently|clearly|finally|overall|in conclusion|in summary|only|which|this|it|means?|implies"
    r"|shows?|follows|we|i|m|am|is|are|see|conclude|think|believe|confident|sure|certain|say|would|find|know|can"
    r"|obviously|indeed|the|option|choice|answer|statement|letter|correct|now)\b\W*)*",
    re.IGNORECASE,
)
HYPOTHESIS = re.compile(
    r"\b(?:if|unless|whether|suppose|supposing|assume|assuming|were|doubt|why|maybe|perhaps|either|neither|possibly"
    r"|might|could|not true|not the case|not|all but|none but|(?:every|any)thing but)\b(?!\s+(?:right|correct|true))"
    r"|n['’]t (?:think|believe)",
    re.IGNORECASE,
)
LETTER_BEFORE = re.compile(r"[A-J]\W{0,4}(?:,|/|&|\band|\bor|\bnor)\s*(?:(?:option|choice)\s*)?\W{0,4}$")
CONCLUDED_WORDS = (
    "therefore", "thus", "hence", "so", "consequently", "∴", "leav", "this ", "that ", "which ", "it ", "it's",
    "it’s", "that's", "that’s", "i think", "i believe", "i guess", "i say", "i answer", "i'd", "i’d", "i would",
    "i will", "i'll", "i’ll", "most likely", "probably", "definitely", "clearly", "certainly", "obviously", "sure",
    "ok", "yes", "no", "by elim",
)  # fmt: skip
CONCLUDED = re.compile(
    r"(?<![A-Za-z])(?:(?:therefore|thus|hence|so|consequently|∴)[,:]?\s+(?:it(?:['’]s| is| must be)\s+)?"
    r"|(?P<first>it(?:['’]s| is| must be| has to be)|that['’]s|i(?:['’]d|['’]ll| would| will)?"
    r" (?:think|believe|guess|say|answer)(?: that)?(?: it(?:['’]s| is))?"
    r"|(?:most likely|probably|definitely|clearly|certainly|obviously|sure|ok(?:ay)?"
    r"|yes|no|by elimination)[,!]?)\s+"
    r"|(?:this|that|which|it)\s+(?:is|corresponds to|matches|gives|means)\s+(?=(?:the )?(?:option|choice|answer)\b)"
    r"|leav(?:es|ing)(?: us)?(?: with)?\s+)(?:(?:option|choice|answer|letter|the|only|just|probably|clearly)\s+){0,3}",
    re.IGNORECASE,
)
"""The group `first` counts only at the start of a sentence or a clause."""
ALONE = re.compile(
    rf"[\s#>=→⇒∴]*{OPEN}(?:(?:the|my|final|correct|right|best)\s+){{0,3}}"
    rf"(?:(?:answer|ans|option|opt\.?|choice|letter|选项|答案)\s*){{0,2}}{OPEN}"
    r"(?P<letter>[A-J])(?:[\s*_$)}\].,:;!\"'`”’」】。]|\\[)\]]){0,12}",
    re.IGNORECASE,
)
LONGEST_ALONE = 80
AS_A_CHOICE = re.compile(
    rf"[\s#>]*(?:(?:option|choice)\s+)?{OPEN}(?P<letter>[A-J])(?:{SHUT}(?P<mark>[).:])|(?P<bracket>\))|\s+[-–—:]\s"
    rf"|,?\s+(?:because|since)\b){SHUT}\s*(?P<rest>.*)"
)
CHOICE_MARK = re.compile(r"([A-J])[):](?!\w)")
MAX_CHOICE_WORDS = 8
NAME_OR_SENTENCE = re.compile(r"^[A-Z]\.|\b(?:is|are|was|were|has|have|had|wrote|said|found|showed)\b")
BRACKETED = re.compile(r"\(([A-J])\)")
PRESENTED = re.compile(
    r"(?:^|\n)[\s*#>-]*$|(?:\b(?:is|be|so|thus|hence|therefore|answer|option|choice)|[:=→]|答案|选)[\s*$]*$",
    re.IGNORECASE,
)
REJECTED = re.compile(
    r"\b(?:not|rule[sd]?|ruling|eliminat\w*|exclud\w*|reject\w*|discard\w*|dismiss\w*|except|wrong|incorrect|nor|never"
    r"|neither|without)\b|n['’]t\b",
    re.IGNORECASE,
)
LOOK_BACK = 100
