r"""Tables of words: units, functions, and words that only introduce or connect answers.

- Used by: `tokens` separates words from rows of variables with it, and `structure` separates units from values.
- Invariant: a word that is in no table is compared, never dropped.
"""

from __future__ import annotations


def words(text: str) -> list[str]:
    """Return the words of a table that is written as one text."""
    return text.split()


def pairs(text: str) -> dict[str, str]:
    """Return a table that is written as one text, in which each name is followed by its value."""
    table = words(text)
    return dict(zip(table[::2], table[1::2], strict=True))


FUNCTIONS = frozenset(
    words(
        "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot ln log lg exp sqrt max min gcd lcm "
        "det abs floor ceil"
    )
)
CONSTANTS = {"pi": r"\pi", "infty": r"\infty", "infinity": r"\infty"}

_UNITS = {
    # unit: its other spellings
    "mm": "millimeter millimetre 毫米",
    "cm": "centimeter centimetre 厘米",
    "dm": "decimeter decimetre 分米",
    "m": "meter metre 米",
    "km": "kilometer kilometre 千米 公里",
    "in": "inch",
    "ft": "foot",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gramme 克",
    "kg": "kilogram 千克 公斤",
    "lb": "pound lbs",
    "oz": "ounce",
    "ton": "tonne 吨",
    "ms": "millisecond",
    "s": "second sec secs 秒",
    "min": "minute mins 分钟",
    "h": "hour hr hrs 小时",
    "day": "天",
    "week": "周",
    "month": "月",
    "year": "yr yrs 年",
    "ml": "mL milliliter millilitre 毫升",
    "L": "l liter litre 升",
    "gal": "gallon",
    "mph": "",
    "kph": "kmh",
    "dollar": "USD usd 美元",
    "cent": "",
    "euro": "EUR",
    "yuan": "RMB CNY 元",
    "yen": "JPY 日元",
    "rupee": "INR Rs rs",
    "deg": "degree \u5ea6",
    "rad": "radian",
    "J": "joule",
    "kJ": "kilojoule",
    "N": "newton",
    "W": "watt",
    "kW": "kilowatt",
    "kWh": "",
    "V": "volt",
    "mV": "millivolt",
    "A": "ampere amp",
    "mA": "milliampere",
    "C": "coulomb celsius Celsius",
    "F": "farad fahrenheit Fahrenheit",
    "K": "kelvin",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "Hz": "hertz",
    "kHz": "",
    "MHz": "",
    "mol": "mole",
    "M": "molar",
    "T": "tesla",
    "eV": "",
    "MeV": "",
    "nm": "nanometer nanometre",
    "cal": "calorie",
    "kcal": "",
    "atm": "",
    "unit": "单位",
    "acre": "",
    "hectare": "ha",
    "people": "person 人",
    "way": "种",
    "piece": "个 件 只",
}
UNITS: dict[str, str] = {}
for _unit, _others in _UNITS.items():
    for _spelling in (_unit, *_others.split()):
        UNITS[_spelling] = _unit
        if len(_spelling) > 3 and _spelling.isascii() and not _spelling.endswith("s"):
            UNITS[_spelling + "s"] = UNITS[_spelling.capitalize()] = UNITS[_spelling.capitalize() + "s"] = _unit
CURRENCIES = {"dollar": "$", "euro": "€", "pounds": "£", "yen": "¥", "rupee": "₹"}
"""Signs by the names that `characters` gives them."""
UNITS |= {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
UNITS |= {
    "feet": "ft",
    "inches": "in",
    "days": "day",
    "tons": "ton",
    "units": "unit",
    "ways": "way",
    "Dollars": "dollar",
}
WRITTEN_TOGETHER = frozenset(words("cm mm km kg dm ft yd mi lb oz mph kph mL ml kWh kW Hz kHz MHz kPa kJ mol"))
"""Units that are read directly after a number without \\text: `5cm`. Others (`mg`, `ms`, `h`) may be variables."""

UNIT_MODIFIERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3", "squared": "^2", "cubed": "^3"}

OTHER_WORDS = frozenset(
    words(
        "not no none or and is are was am pm less more least most than at up down max min maximum minimum increase "
        "decrease gain loss profit north south east west left right above below under over negative positive minus "
        "plus times dozen hundreds thousands millions billions dozens halves thirds quarters tenths pairs yes false "
        "true always this its becomes has does as odds evens primes solutions answers equals exists roots days' weeks' "
        "upwards downwards forwards backwards inwards outwards northwards southwards eastwards westwards towards "
        "clockwise counterclockwise versus thus perhaps besides whereas "
        "unless ones tens twos threes"
    )
)
MONTHS = frozenset(words("january february march april may june july august september october november december"))
MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}

CAPITAL_WORDS = frozenset(words("AM PM DNE YES NO TRUE FALSE NONE AND OR"))

INTRODUCTIONS = (
    "the final answer is",
    "the correct answer is",
    "the answer is",
    "final answer is",
    "final answer",
    "answer is",
    "answer",
    "therefore",
    "thus",
    "hence",
    "so",
    "ans",
)
NUMBER_WORDS = {
    name: number
    for number, name in enumerate(
        words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty"
        )
    )
}
ARTICLES = frozenset({"the", "a", "an"})
BASE_NAMES = {
    **{name: number for number, name in enumerate(words("two three four five six seven eight nine ten"), 2)},
    "twelve": 12,
    "sixteen": 16,
}
