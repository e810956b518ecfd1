import pytest

from grpo_worker.errors import MAX_LINE_CHARACTERS, one_line

INVALID = "GenerationConfig is invalid: \n- `temperature`: `do_sample` is not set to `True`.\n- `top_p`: the same.\n"
TORCH = "connect() timed out\nException raised from wait at ../TCPStore.cpp:12 (most recent call first):\nframe #0: c10::Error"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError(INVALID),
            "GenerationConfig is invalid: - `temperature`: `do_sample` is not set to `True`. - `top_p`: the same.",
        ),
        (RuntimeError(TORCH), "connect() timed out"),
        (KeyError("model.layers.0"), "KeyError: 'model.layers.0'"),
        (TimeoutError(), "TimeoutError"),
        ("\n  first\nsecond  ", "first second"),
        ("", ""),
    ],
)
def test_an_error_becomes_one_line_with_all_that_it_says(error: BaseException | str, line: str) -> None:
    assert one_line(error) == line


def test_of_a_long_text_both_ends_stay() -> None:
    line = one_line(f"begin {'x' * 5000} end")
    assert line.startswith("begin x")
    assert line.endswith("x end")
    assert len(line) < MAX_LINE_CHARACTERS + 10
