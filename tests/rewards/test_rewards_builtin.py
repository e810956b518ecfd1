"""Each built-in function against a table of good, wrong and tricky responses."""

import json
from collections.abc import Callable
from fractions import Fraction

import pytest
import reasoning_gym as rg

from grpo_worker.rewards.base import RewardInput, RewardResult, as_result
from grpo_worker.rewards.lookup import resolve

Make = Callable[..., RewardInput]


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("The answer is 42", "42", 1.0),
        ("so 6 * 7 = 42.", "42", 1.0),
        ("1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("It costs $12.50.", "12.5", 1.0),
        ("$12.50", "12.50", 1.0),
        ("-$5", "-5", 1.0),
        ("$-5", "-5", 1.0),
        ("x = -7", "-7", 1.0),
        ("x = \u22127", "-7", 1.0),
        ("between 3-4", "4", 1.0),
        ("7 - 3 = 4", "4", 1.0),
        ("42 apples", "42", 1.0),
        ("42%", "42", 1.0),
        ("\\boxed{42}", "42", 1.0),
        ("42.0", "42", 1.0),
        (".5", "0.5", 1.0),
        ("#### 42.", "42", 1.0),
        ("It was 42, then 41", "42", 0.0),
        ("-42", "42", 0.0),
        ("no idea", "42", 0.0),
        ("", "42", 0.0),
        ("...,,,", "42", 0.0),
        ("72", "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", 1.0),
        ("are 4,5", "5", 1.0),
        ("are 4,5", "45", 0.0),
        ("70{,}000", "70000", 1.0),
        (r"70,\!000", "70000", 1.0),
        (r"\$70,\!000", "70000", 1.0),
        ("70 000", "70000", 1.0),
        ("70\u202f000", "70000", 1.0),
        ("3/4", "3/4", 1.0),
        ("4", "3/4", 0.0),
        ("0.75", "3/4", 1.0),
        (r"\boxed{\frac{3}{4}}", "0.75", 1.0),
        ("1 1/2", "1.5", 1.0),
        ("1.5e3", "1500", 1.0),
        ("at 10:30", "30", 0.0),
        ("on 3/4/2020", "2020", 0.0),
        ("x1 = -5", "-5", 1.0),
        ("1.2.3", "3", 1.0),
        ("5/0", "5", 0.0),
    ],
)
def test_gsm8k_flexible_takes_the_last_number(sample: Make, response: str, truth: str, score: float) -> None:
    assert resolve("gsm8k")(sample(response, truth)) == RewardResult(score, accuracy=score)


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("#### 42", "42", 1.0),
        ("reasoning 41\n#### 42.", "42", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### $12.50", "12.5", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 42 apples", "42", 1.0),
        ("#### 1\n#### 42", "42", 1.0),
        ("#### 42\nand 7 more words", "42", 1.0),
        ("42", "42", 0.0),
        ("### 42", "42", 0.0),
        ("#### forty-two", "42", 0.0),
        ("#### 41", "42", 0.0),
        ("#### 1,2", "12", 0.0),
        ("#### 1,2", "1", 0.0),
        ("#### +3", "3", 1.0),
        ("#### - 3", "-3", 1.0),
        ("#### 42m2", "42", 1.0),
        ("#### 10:30", "10", 0.0),
        ("#### 3/4", "0.75", 1.0),
        ("####\n42", "42", 0.0),
        ("#### 4-5", "4", 0.0),
    ],
)
def test_gsm8k_strict_takes_the_number_after_the_marks(sample: Make, response: str, truth: str, score: float) -> None:
    assert resolve("gsm8k", {"method": "strict"})(sample(response, truth)).score == score


@pytest.mark.parametrize(
    ("response", "score", "accuracy"), [("#### 42", 2.0, 1.0), ("#### 41", 0.1, 0.0), ("42", 0.0, 0.0)]
)
def test_gsm8k_pays_for_the_format_of_a_wrong_answer(
    sample: Make, response: str, score: float, accuracy: float
) -> None:
    function = resolve("gsm8k", {"method": "strict", "score": 2.0, "format_score": 0.1})
    assert function(sample(response, "42")) == RewardResult(score, accuracy)


@pytest.mark.parametrize("truth", ["unknown", "", "12 or 13", "10:30", "1,2", "#### 5 or 6", "3 #### none"])
def test_a_gsm8k_ground_truth_that_is_not_one_number_is_an_error_not_a_zero(sample: Make, truth: str) -> None:
    with pytest.raises(ValueError, match="does not hold exactly one number"):
        resolve("gsm8k")(sample("42", truth))


def test_gsm8k_reads_a_number_of_any_length_exactly() -> None:
    from grpo_worker.rewards.gsm8k import extract_number

    assert extract_number("9" * 50 + ".1") == Fraction("9" * 50 + ".1")


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        (r"Thus $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1/2}", "0.5", 1.0),
        ("The answer is 42.", "42", 1.0),
        (r"$x = 3$", "3", 1.0),
        (r"\boxed{x^2 + 2x + 1}", r"$(x+1)^2$", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"\boxed{42}", r"Then \(x\) is \boxed{42}.", 1.0),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"\boxed{2}. Wait, ... \boxed{3}", "3", 1.0),
        (r"\boxed{2}. Wait, ... \boxed{3}", "2", 0.0),
        (r"\boxed{1} \boxed{2} \boxed{3}", "3", 1.0),
        (r"$\boxed{1}$ or $\boxed{2}$", r"\{1, 2\}", 1.0),
        (r"\boxed{5}", r"\$5", 1.0),
        (r"\boxed{\$5}", "5", 1.0),
        (r"\boxed{32348}", r"\$32,\!348", 1.0),
        (r"\boxed{5}", r"\text{\$5}", 1.0),
        (r"\boxed{70\,000}", "70000", 1.0),
        (r"\boxed{70\,000}", "0", 0.0),
        (r"\boxed{1 000}", "1000", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{0.333333}", r"\frac{1}{3}", 1.0),
        (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}", 0.0),
        (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2006!}", 1.0),
        (r"\boxed{1.2 \cdot 10^{-7}}", r"1.3 \cdot 10^{-7}", 0.0),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", 0.0),
        (r"\boxed{-3}", "3", 0.0),
        ("", "3", 0.0),
        ("I do not know", "3", 0.0),
    ],
)
def test_math_compares_as_mathematics(sample: Make, response: str, truth: str, score: float) -> None:
    result = resolve("math")(sample(response, truth))
    assert (result.score, result.accuracy) == (score, score)


@pytest.mark.parametrize(
    ("response", "score", "parsed"),
    [(r"\boxed{7} no, \boxed{\frac{6}{2}}", 1.0, 1.0), ("The answer is 3", 0.0, 0.0), (r"3 or \boxed{4}", 0.0, 1.0)],
)
def test_math_boxed_reads_the_last_box_only(sample: Make, response: str, score: float, parsed: float) -> None:
    result = resolve("math", {"method": "boxed"})(sample(response, "3"))
    assert (result.score, result.extra["parsed"]) == (score, parsed)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"a \boxed{\frac{1}{2}} b", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{1} \boxed{2", r"\boxed{1}"),
        (r"\boxed{", None),
        ("none", None),
    ],
)
def test_the_last_complete_box_is_found(text: str, box: str | None) -> None:
    from grpo_worker.rewards.math import last_boxed

    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("options", "response", "truth", "score"),
    [
        ({}, "Paris", "Paris", 1.0),
        ({}, "  New\n York ", "New York", 1.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "paris", "Paris", 1.0),
        ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ({"strip": False}, "Paris ", "Paris", 0.0),
        ({"normalise_whitespace": False}, "New  York", "New York", 0.0),
        ({"normalise_whitespace": False}, " New York\n", "New York", 1.0),
        ({}, "", "Paris", 0.0),
        ({}, "Paris, France", "Paris", 0.0),
    ],
)
def test_exact_match_forgives_what_its_options_say(
    sample: Make, options: dict[str, bool], response: str, truth: str, score: float
) -> None:
    assert resolve("exactMatch", options)(sample(response, truth)) == RewardResult(score, accuracy=score)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>a\nb</think>\n<answer>42</answer>", 1.0),
        ("  <think></think><answer></answer>\n", 1.0),
        ("<think>a</think> so <answer>42</answer>", 0.0),
        ("<think>a</think><answer>42</answer> done", 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
        ("<think><think>a</think></think><answer>1</answer>", 0.0),
        ("<answer>42</answer>", 0.0),
        ("42", 0.0),
    ],
)
def test_format_matches_the_whole_response(sample: Make, response: str, score: float) -> None:
    assert resolve("format")(sample(response)) == RewardResult(score, accuracy=None)


def test_format_takes_a_pattern_and_a_weight(sample: Make) -> None:
    function = resolve("format", {"pattern": r".*#### \d+", "weight": 0.2})
    assert [function(sample(text)).score for text in ("a\n#### 4", "#### four")] == [0.2, 0.0]


@pytest.mark.parametrize(
    "task", ["chain_sum", "basic_arithmetic", "gsm_symbolic", "leg_counting", "count_primes", "rearc"]
)
def test_reasoning_gym_scores_the_right_answer_1_and_a_wrong_one_less(sample: Make, task: str) -> None:
    function = resolve("reasoningGym")
    for entry in rg.create_dataset(task, seed=7, size=3):
        columns = {"task": task, "entry": json.dumps(entry)}
        right, wrong = (sample(text, **columns) for text in (entry["answer"], entry["answer"] + "1"))
        assert function(right) == RewardResult(1.0, accuracy=1.0)
        assert function(wrong).score < 1.0
        assert function(wrong).accuracy == 0.0


@pytest.mark.parametrize(
    ("options", "response", "full"),
    [
        ({}, "<think>4 or 5</think> <answer>7</answer>", True),
        ({}, " 7\n", True),
        ({}, "<answer>1</answer> no, <answer>7</answer>", True),
        ({"answer_tag": "final"}, "<final>7</final>", True),
        ({"answer_tag": None}, "<answer>7</answer>", False),
        ({}, "it is 7", False),
    ],
)
def test_reasoning_gym_reads_the_tagged_answer(
    sample: Make, options: dict[str, str | None], response: str, full: bool
) -> None:
    entry = {"question": "3 + 4", "answer": "7", "metadata": {}}
    result = resolve("reasoningGym", options)(sample(response, task="chain_sum", entry=json.dumps(entry)))
    assert (result.accuracy == 1.0) == full


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "chain_sum", "x": 1}, r"no column 'entry' \(columns: task, x\)"),
        ({"task": "chain_sums", "entry": '{"question": "", "answer": "", "metadata": {}}'}, "close: chain_sum"),
        ({"task": "chain_sum", "entry": "[]"}, "not a JSON object with question, answer and metadata"),
    ],
)
def test_reasoning_gym_names_what_a_row_lacks(sample: Make, data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("reasoningGym")(sample("7", **data))


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("gsm8k", "1 and #### 1,234.50", "1234.5"),
        ("gsm8k", "no number", ""),
        ("math", r"so \boxed{\frac{1}{2}}", "1/2"),
        ("math", "nothing", ""),
        ("exactMatch", "  New\nYork ", "New York"),
        ("format", "x", None),
    ],
)
def test_what_was_taken_as_the_answer_is_told_for_the_vote(name: str, response: str, answer: str | None) -> None:
    assert resolve(name)(RewardInput("p", response, "1")).answer == answer


def test_verls_pred_is_the_answer() -> None:
    assert as_result({"score": 1.0, "acc": True, "pred": 7}).answer == "7"
