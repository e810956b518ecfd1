r"""Numbers as people and models write them. The grammar (docs/rewards.md has it with examples):

    number    = [sign] [currency] [sign] value
    value     = fraction | mixed | decimal
    decimal   = (grouped | digits) ["." digits] [exponent] | "." digits [exponent]
    grouped   = 1 to 3 digits, then groups of exactly 3, all behind the same separator: , {,} \, ,\! or a space
    exponent  = ("e" | "E") [sign] 1 to 3 digits
    fraction  = digits "/" digits | \frac{digits}{digits}
    mixed     = digits " " digits "/" digits

Invariant: a number is exact (`Fraction`), and text that has a digit is never read as less than it says: `1,2` is no 12, `10:30` no 10.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 1000  # a longer one is no number: its arithmetic would take time

_SIGN = "[-+\u2212]"
_CURRENCY = r"(?:\\?\$|[€£¥₹])"
# A sign right after a digit, a letter or a closing bracket is an operator: "3-4" ends in 4.
_HEAD = rf"(?P<sign>(?:(?<![\w.)\]}}]){_SIGN})?)(?:{_CURRENCY}[ \t]?)?(?P<sign_inside>(?:(?<=\$){_SIGN})?)"
_GROUPED = r"\d{1,3}(?P<separator>,\\!|\{,\}|\\,|,|[ \u00a0\u2009\u202f])\d{3}(?:(?P=separator)\d{3})*(?!\d)"
_EXPONENT = rf"(?:[eE]{_SIGN}?\d{{1,3}}(?![\w.]))?"
_VALUE = re.compile(
    rf"""{_HEAD}(?:
      (?P<other>\d+(?:(?::|/)\d+)*(?::\d+|/\d+/\d+))            # a time, a ratio, a date
    | (?:(?P<whole>\d+)[ ])?(?P<above>\d+)/(?P<below>\d+)(?![\d.])
    | (?:(?P<latex_whole>\d+)[ ]?)?\\[dt]?frac\{{(?P<latex_above>\d+)\}}\{{(?P<latex_below>\d+)\}}
    | (?P<decimal>(?:{_GROUPED}|\d+)(?:\.\d+)?{_EXPONENT} | (?<![\d.])\.\d+{_EXPONENT})
    )""",
    re.VERBOSE,
)
_SEPARATORS = re.compile(r"[^0-9.eE+-]")


@dataclass(frozen=True)
class Number:
    """A number of a text, and where it stands."""

    value: Fraction
    start: int
    end: int


def numbers(text: str) -> Iterator[Number]:
    """All numbers of a text, in order. Times (`10:30`), ratios and dates are none."""
    for match in _VALUE.finditer(text):
        if (value := _value(match)) is not None:
            yield Number(value, match.start(), match.end())


def number_at(text: str) -> Number | None:
    """The number that a text begins with, after blanks; a sign may have blanks behind it. None where punctuation and a digit follow:
    `1,2` and `4-5` are not 1 and 4."""
    begin = re.match(rf"[ \t]*(?:({_SIGN})[ \t]+)?", text)
    assert begin is not None
    found = next(numbers(text[begin.end() :]), None)
    if found is None or found.start or re.match(r"[.,:/\u2212-]\d", text[begin.end() + found.end :]):
        return None
    value = -found.value if begin[1] in ("-", "\u2212") else found.value
    return Number(value, begin.end(), begin.end() + found.end)


def only_number(text: str) -> Fraction | None:
    """The number of a text that has one and no more, with words around it; None for any other."""
    found = list(_VALUE.finditer(text))
    return _value(found[0]) if len(found) == 1 else None


def as_text(value: Fraction) -> str:
    """Digits, a sign, a point where it ends, else `a/b`: what `only_number` reads as the same."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _value(match: re.Match[str]) -> Fraction | None:
    if match["other"] or match.end() - match.start() > MAX_CHARACTERS:
        return None
    above, below = match["above"] or match["latex_above"], match["below"] or match["latex_below"]
    if above:
        if not int(below):
            return None
        value = Fraction(int(above), int(below)) + int(match["whole"] or match["latex_whole"] or 0)
    else:
        # \d is a digit of any script, as int() reads them above; Fraction knows ours.
        digits = "".join(
            str(int(each)) if each.isdecimal() else each for each in match["decimal"].replace("\u2212", "-")
        )
        value = Fraction(_SEPARATORS.sub("", digits))
    negative = match["sign"] in ("-", "\u2212") or match["sign_inside"] in ("-", "\u2212")
    return -value if negative else value
