"""What a formatter writes, the reader of numbers reads, alone and inside a sentence; nothing is read as less than it says."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from grpo_worker.rewards.numbers import MAX_CHARACTERS, as_text, number_at, numbers, only_number

SEPARATORS = ("", ",", "{,}", r"\,", r",\!", " ", "\u2009", "\u00a0", "\u202f")
wholes = some.integers(0, 10**30)
signs = some.sampled_from([("", 1), ("-", -1), ("\u2212", -1), ("+", 1)])


def grouped(number: int, separator: str) -> str:
    return f"{number:,}".replace(",", separator)


@given(
    wholes,
    some.sampled_from(SEPARATORS),
    signs,
    some.sampled_from(["", "$", r"\$", "€"]),
    some.text("0123456789", max_size=6),
)
def test_a_number_in_any_dress_is_that_number(
    whole: int, separator: str, sign: tuple[str, int], currency: str, decimals: str
) -> None:
    text = sign[0] + currency + grouped(whole, separator) + (f".{decimals}" if decimals else "")
    value = sign[1] * (whole + Fraction(int(decimals or 0), 10 ** len(decimals)))
    assert only_number(text) == value
    assert only_number(f"So the answer is {text}.") == value
    at = number_at(f"  {text} apples")
    assert at is not None and at.value == value
    assert [number.value for number in numbers(f"7 and then {text}\nand (8)")] == [7, value, 8]


@given(some.integers(0, 10**9), some.integers(1, 10**6), signs)
def test_a_fraction_is_exact(above: int, below: int, sign: tuple[str, int]) -> None:
    value = sign[1] * Fraction(above, below)
    for text in (f"{above}/{below}", rf"\frac{{{above}}}{{{below}}}", rf"\dfrac{{{above}}}{{{below}}}"):
        assert only_number(sign[0] + text) == value


@given(some.integers(0, 10**6), some.integers(1, 99), some.integers(1, 99))
def test_a_mixed_number_is_the_sum_of_its_parts(whole: int, above: int, below: int) -> None:
    assert only_number(f"{whole} {above}/{below}") == whole + Fraction(above, below)
    assert only_number(rf"{whole}\frac{{{above}}}{{{below}}}") == whole + Fraction(above, below)


@given(some.integers(0, 9999), some.text("0123456789", max_size=4), some.integers(-999, 999))
def test_an_exponent_is_a_power_of_ten(whole: int, decimals: str, exponent: int) -> None:
    text = f"{whole}.{decimals}e{exponent}" if decimals else f"{whole}E{exponent:+d}"
    assert only_number(text) == (whole + Fraction(int(decimals or 0), 10 ** len(decimals))) * Fraction(10) ** exponent


@given(some.fractions())
def test_what_is_written_as_text_is_read_as_the_same(value: Fraction) -> None:
    assert only_number(as_text(value)) == value


@pytest.mark.parametrize(
    ("value", "text"), [("-1/8", "-0.125"), ("1/3", "1/3"), ("5", "5"), ("-1/20", "-0.05"), ("5/2", "2.5")]
)
def test_a_value_is_written_with_a_point_where_it_ends(value: str, text: str) -> None:
    assert as_text(Fraction(value)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "1,2",
        "12,34",
        "10:30",
        "3/4/2020",
        "2:3",
        "5/0",
        "1 or 2",
        "1e9999",
        "4-5",
        "1.2.3",
        "9" * (MAX_CHARACTERS + 1),
    ],
)
def test_what_is_not_one_number_is_none(text: str) -> None:
    assert only_number(text) is None
    assert number_at(text) is None or text in ("1 or 2", "1e9999")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\U0001d7ce", 0),
        ("\u0661\u0662", 12),
        ("12\u0663", 123),
        ("\uff11.\uff15", Fraction(3, 2)),
        ("\u0663/4", Fraction(3, 4)),
    ],
)
def test_digits_of_other_scripts_are_digits(text: str, value: Fraction) -> None:
    assert only_number(text) == value


@given(some.text())
@example("\U0001d7ce")
def test_any_text_is_read_without_an_error(text: str) -> None:
    places = [(number.start, number.end) for number in numbers(text)]
    assert places == sorted(places)
    only_number(text)
    number_at(text)


@given(some.text("0123456789,. -/\\!{}$:e", max_size=30))
def test_a_number_is_never_a_part_of_longer_digits(text: str) -> None:
    for number in numbers(text):
        assert number.end == len(text) or not text[number.end].isdigit()
        assert number.start == 0 or not (text[number.start].isdigit() and text[number.start - 1].isdigit())
