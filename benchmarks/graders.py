r"""Graders on the same strings: ours, math-verify's plain use, and verl's own scorers, against the right verdict of each.

    python -m benchmarks.graders            # fetches verl's wheel from PyPI; prints JSON with every disagreement

A case is (response, ground truth, whether a teacher would take it). What a scorer raises counts as its own verdict: the sample is lost.
"""

import importlib.util
import json
import logging
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_worker.rewards.base import RewardInput
from grpo_worker.rewards.lookup import resolve

VERL = "verl==0.9.1"
Verdict = bool | str

# Answers of word problems: one number.
NUMBERS: list[tuple[str, str, bool]] = [
    ("#### 42", "42", True),
    ("#### 42.", "42", True),
    ("#### 42.0", "42", True),
    ("#### 1,234", "1234", True),
    ("#### $1,234", "1234", True),
    ("#### 1,2", "12", False),
    ("#### +3", "3", True),
    ("#### -3", "-3", True),
    ("#### \u22123", "-3", True),
    ("#### - 3", "-3", True),
    (r"#### 70{,}000", "70000", True),
    (r"#### 70,\!000", "70000", True),
    ("#### 70 000", "70000", True),
    ("#### 3/4", "0.75", True),
    ("#### 0.75", "3/4", True),
    ("#### 4", "3/4", False),
    ("#### 1 1/2", "1.5", True),
    ("#### 1.5e3", "1500", True),
    ("#### 10:30", "10", False),
    ("#### 42 apples", "42", True),
    ("#### 41\nNo: #### 42", "42", True),
    ("#### 42\nNo: #### 41", "42", False),
    ("#### 0.5", ".5", True),
    ("#### 007", "7", True),
    ("#### 4-5", "4", False),
]
# The same without the mark.
FREE_NUMBERS: list[tuple[str, str, bool]] = [
    ("The answer is 42.", "42", True),
    ("They are 4,5", "5", True),
    ("between 3-4", "4", True),
    ("It costs $12.50", "12.5", True),
    ("x = -7", "-7", True),
    ("7 - 3 = 4", "4", True),
    ("42%", "42", True),
    (r"\boxed{\frac{3}{4}}", "0.75", True),
    ("It is 1.2, or 12/10", "1.2", True),
    ("at 10:30", "30", False),
    ("It was 42, then 41", "42", False),
    ("42 ...", "42", True),
]
# Answers of competition problems.
MATH: list[tuple[str, str, bool]] = [
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
    (r"\boxed{2}. Wait, no: \boxed{3}", "3", True),
    (r"\boxed{2}. Wait, no: \boxed{3}", "2", False),
    (r"\boxed{1} \boxed{2} \boxed{3}", "3", True),
    (r"$\boxed{1}$ or $\boxed{2}$", r"\{1, 2\}", True),
    (r"\boxed{5}", r"\$5", True),
    (r"\boxed{\$5}", "5", True),
    (r"\boxed{32348}", r"\$32,\!348", True),
    (r"\boxed{5}", r"\text{\$5}", True),
    (r"\boxed{70\,000}", "70000", True),
    (r"\boxed{70\,000}", "0", False),
    (r"\boxed{1 000}", "1000", True),
    (r"\boxed{1{,}000}", "1000", True),
    (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}", False),
    (r"\boxed{0.0000001}", "0.0000002", False),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
    (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2", True),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
    (r"\boxed{x = 3}", "3", True),
    (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{12^\circ}", "12", True),
    (r"\boxed{\text{(A)}}", "A", True),
    (r"\boxed{(1, 2)}", "(1,2)", True),
    (r"\boxed{(2, 1)}", "(1,2)", False),
    (r"\boxed{-3}", "3", False),
    ("The answer is 3", "3", True),
    (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}", True),
    (r"\boxed{5 \text{ dollars}}", "5", True),
]


def ours(name: str, **options: Any) -> Callable[[str, str], bool]:
    """One of our graders, by its name in the document."""
    function = resolve(name, options)
    return lambda response, truth: function(RewardInput(prompt="", response=response, ground_truth=truth)).score == 1.0


def plain_math_verify(response: str, truth: str) -> bool:
    """As its README says: the truth in a box, both parsed, verified."""
    from math_verify import parse, verify

    return bool(
        verify(
            parse(rf"\boxed{{{truth}}}", parsing_timeout=None),
            parse(response, parsing_timeout=None),
            timeout_seconds=None,
        )
    )


def verl_scorers(folder: Path) -> dict[str, ModuleType]:
    """verl's modules from its wheel, without what the package as a whole needs."""
    download = ["python3", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), VERL]
    subprocess.run(download, check=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    modules = {}
    for name in ("gsm8k", "math_reward", "math_dapo"):
        spec = importlib.util.spec_from_file_location(name, folder / "verl" / "utils" / "reward_score" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


def verdict(scorer: Callable[[str, str], Any], response: str, truth: str) -> Verdict:
    try:
        return bool(scorer(response, truth))
    except Exception as error:  # whatever it raises is its verdict
        return f"raises {type(error).__name__}"


def compare(cases: list[tuple[str, str, bool]], scorers: dict[str, Callable[[str, str], Any]]) -> dict[str, Any]:
    """How often each is right, and each case that some scorer gets wrong."""
    verdicts = [
        ({name: verdict(scorer, response, truth) for name, scorer in scorers.items()}, response, truth, right)
        for response, truth, right in cases
    ]
    return {
        "cases": len(cases),
        "right": {name: sum(given[name] is right for given, _, _, right in verdicts) for name in scorers},
        "disagreements": [
            {
                "response": response,
                "truth": truth,
                "right": right,
                "wrong": {name: said for name, said in given.items() if said is not right},
            }
            for given, response, truth, right in verdicts
            if any(said is not right for said in given.values())
        ],
    }


def main() -> dict[str, Any]:
    """Every set of cases with its scorers."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        verl = verl_scorers(Path(folder))
        gsm8k, math_reward, math_dapo = verl["gsm8k"], verl["math_reward"], verl["math_dapo"]
        return {
            "versions": {"verl": VERL.partition("==")[2], "math-verify": version("math-verify")},
            "gsm8k, strict": compare(
                NUMBERS,
                {"ours": ours("gsm8k", method="strict"), "verl": lambda r, t: gsm8k.compute_score(r, t, "strict")},
            ),
            "gsm8k, flexible": compare(
                FREE_NUMBERS, {"ours": ours("gsm8k"), "verl": lambda r, t: gsm8k.compute_score(r, t, "flexible")}
            ),
            "math": compare(
                MATH,
                {
                    "ours": ours("math"),
                    "math-verify": plain_math_verify,
                    "verl math_reward": math_reward.compute_score,
                    "verl math_dapo": lambda r, t: math_dapo.compute_score(r, t)["acc"],
                },
            ),
        }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1, ensure_ascii=False))
