"""The report of a run: whole, partial, damaged and hostile run directories."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_worker.errors import ConfigError, DataError
from grpo_worker.report import write_report
from grpo_worker.report.curves import Chart, Series, make_charts, smooth
from grpo_worker.report.svg import MAX_POINTS, bounded_line, chart_svg, nice_ticks, value_range

START = 1_780_000_000.0
STEPS = 60


def metrics_row(step: int) -> dict[str, Any]:
    """A step of a run that learns: formulas, with a ripple in place of noise."""
    learned = 1 - math.exp(-step / 18)
    ripple = math.sin(step * 2.3) * 0.5 + math.sin(step * 5.1) * 0.5
    row: dict[str, Any] = {
        "step": step,
        "epoch": step / 15,
        "critic/score/mean": 0.18 + 0.62 * learned + 0.04 * ripple,
        "response_length/mean": 28 + 14 * learned + 2 * ripple,
        "response_length/max": 64.0,
        "actor/ppo_kl": 0.0004 * (1 + 0.5 * ripple),
        "actor/kl_loss": 0.02 * learned + 0.001 * abs(ripple),
        "actor/entropy": 0.9 - 0.5 * learned + 0.02 * ripple,
        "actor/grad_norm": 0.35 + 0.1 * ripple + (0.8 if step == 31 else 0),
        "actor/pg_clipfrac": 0.012 + 0.004 * ripple,
        "actor/pg_clipfrac_lower": 0.0004,
        "training/rollout_logprobs_abs_diff_mean": 2.1e-5 + 1e-6 * ripple,
        "perf/throughput": 1850 + 120 * ripple,
        "training/off_policy/trajectory_staleness/mean": 0.4 + 0.1 * ripple,
        "training/off_policy/trajectory_staleness/max": 1,
        "timing_s/gen": 4.1 + 0.3 * ripple,
        "timing_s/reward": 0.12,
        "timing_s/old_log_prob": 0.9,
        "timing_s/adv": 0.01,
        "timing_s/update_actor": 2.3 + 0.1 * ripple,
        "timing_s/update_weights": 0.35,
    }
    row["timing_s/step"] = sum(value for key, value in row.items() if key.startswith("timing_s/")) + 0.2
    if step % 5 == 0:
        row["val/accuracy/pass@1"] = 0.17 + 0.66 * learned
        row["val/accuracy/mean@4"] = 0.12 + 0.63 * learned
        row["timing_s/testing"] = 1.4
    return row


def write_run(run_dir: Path, steps: int = STEPS) -> Path:
    """A run directory as `grpo run` leaves it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    first = {"step": 0, "epoch": 0, "val/accuracy/pass@1": 0.17, "val/accuracy/mean@4": 0.12}
    rows = [first, *(metrics_row(step) for step in range(1, steps + 1))]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [
        ("info", "RunStarted", "Run arithmetic: 60 steps of 64 prompts x 8 samples"),
        ("warning", "RequestRetried", "rollout-1 did not answer for 30 s; its 12 prompts go to rollout-0"),
        ("error", "MemberLost", "rollout-1 ended with exit code 137"),
        ("warning", "MemberRestarted", "rollout-1 is started again (1 of 3 restarts without progress)"),
        ("info", "CheckpointSaved", "Checkpoint epoch_4_step_60 saved in 1.2 s"),
    ]
    with (run_dir / "events.jsonl").open("w") as file:
        for i, (level, reason, message) in enumerate(events):
            event = {
                "time": START + 130.0 * i,
                "role": "coordinator",
                "level": level,
                "reason": reason,
                "message": message,
            }
            file.write(json.dumps(event) + "\n")
    with (run_dir / "samples.jsonl").open("w") as file:
        for step in (0, 30, steps):
            for i in range(8):
                right = (step == steps and i != 5) or i == 2
                answer = 12 * i + 7 + 3 * i
                response = f"12 * {i} = {12 * i}\n{12 * i} + {7 + 3 * i} = {answer}\n#### {answer if right else answer + 1 + i}"
                sample = {
                    "step": step, "kind": "validation", "uid": f"val-{i}", "prompt": f"12 * {i} + {7 + 3 * i} = ?",
                    "response": response, "ground_truth": str(answer), "score": float(right), "accuracy": float(right),
                }  # fmt: skip
                file.write(json.dumps(sample) + "\n")
    job = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "arithmetic"},
        "spec": {
            "model": {"path": "models/tiny-qwen3"},
            "data": {"trainFiles": ["data/train.parquet"], "trainBatchSize": 64},
            "reward": {"function": "gsm8k"},
            "algorithm": {"preset": "DAPO", "advantageEstimator": "grpo"},
            "actor": {"optim": {"lr": 1e-6}},
            "rollout": {"n": 8, "maxStaleness": 1},
            "trainer": {"totalSteps": steps},
        },
    }
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return run_dir


class Page(HTMLParser):
    """What a browser would see: tags in balance, text, addresses."""

    void = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


def report_of(run_dir: Path) -> Page:
    html, png = write_report(run_dir)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("run")))[0].read_text(encoding="utf-8")


def test_the_report_is_two_files_beside_the_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    before = {path.name for path in run_dir.iterdir()}
    assert write_report(run_dir) == (run_dir / "report.html", run_dir / "report.png")
    assert {path.name for path in run_dir.iterdir()} - before == {"report.html", "report.png"}


def test_the_headline_tells_accuracy_steps_duration_model_and_preset(tmp_path: Path) -> None:
    text = report_of(write_run(tmp_path)).text
    for expected in (
        "arithmetic",
        "0.170 → 0.806",
        "+0.636",
        "60",
        "8 min 40 s",
        "models/tiny-qwen3",
        "DAPO",
        "64 prompts x 8",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    "title",
    [
        "Reward", "Validation accuracy", "Response length", "KL", "Entropy", "Gradient norm", "Clip fraction",
        "Log-prob mismatch", "Tokens per second", "Staleness", "Step time",
    ],
)  # fmt: skip
def test_each_curve_is_drawn(whole_report: str, title: str) -> None:
    html = whole_report
    assert f"<h3>{title}</h3>" in html and f'aria-label="{title} by step"' in html
    assert "Not logged" not in html


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name in {"src", "href", "srcset", "style"} or name.startswith("on")
    ]
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html) < 400_000


def test_samples_stand_before_and_after_for_the_same_prompt(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path))
    assert "Before (step 0)" in page.text and "After (step 60)" in page.text
    assert page.text.count("✓") == 1 + 7 and page.text.count("✗") == 7 + 1


def test_warnings_and_restarts_are_listed_and_ordinary_events_are_not(tmp_path: Path) -> None:
    text = report_of(write_run(tmp_path)).text
    assert "rollout-1 ended with exit code 137" in text and "MemberRestarted" in text
    assert "CheckpointSaved" not in text and "RunStarted" not in text


def test_text_from_the_run_is_never_markup(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    evil = "</pre></td></style></title><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'$x_$"
    sample = {
        "step": 0,
        "kind": "validation",
        "uid": evil,
        "prompt": evil,
        "response": evil,
        "ground_truth": evil,
        "score": 1,
    }
    with (run_dir / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"time": START, "role": evil, "level": evil, "reason": evil + "restart", "message": evil}) + "\n"
        )
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, f"val/accuracy/mean@{evil}": 0.5, f"timing_s/{evil}": 1.0}) + "\n")
    job = {"metadata": {"name": evil}, "spec": {"model": {"path": evil}, "algorithm": {"preset": evil}}}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job))
    page = report_of(run_dir)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("alert(1)") >= 8


@pytest.mark.parametrize(
    "missing", [("job.yaml",), ("events.jsonl",), ("samples.jsonl",), ("job.yaml", "events.jsonl", "samples.jsonl")]
)
def test_a_missing_file_costs_its_section_only(tmp_path: Path, missing: tuple[str, ...]) -> None:
    run_dir = write_run(tmp_path, steps=6)
    for name in missing:
        (run_dir / name).unlink()
    page = report_of(run_dir)
    assert "0.170 → " in page.text
    assert ("job.yaml cannot be read" in page.text) == ("job.yaml" in missing)


def test_a_reward_function_without_accuracy_is_shown_by_its_validation_score(tmp_path: Path) -> None:
    lines = [
        '{"step": 0, "val/score/pass@1": -2.5}',
        '{"step": 1, "critic/score/mean": 0.5, "val/score/pass@1": 1.5, "val/score/mean@4": 1.25}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report_of(tmp_path)
    assert "Validation score" in page.text
    assert "-2.500 → 1.500" in page.text
    assert "mean@4, sampled" in page.text
    assert "Not logged in this run: Validation accuracy" in page.text


@pytest.mark.parametrize(
    "lines",
    [
        ['{"step": 0, "val/accuracy/pass@1": 0.2}'],
        ['{"step": 1}'],
        ['{"step": 1, "critic/score/mean": 0.5}'],
        ['{"step": 1, "critic/score/mean": NaN}', '{"step": 2, "critic/score/mean": null}', '{"step": 3, "timing_s/step": 0}'],
        ['{"step": 1, "critic/score/mean": 0.1}', "torn {", '{"step": 2, "critic/score/mean": 0.3}', '{"step": 2, "x": 1}'],
        ['{"step": 5, "critic/score/mean": -3, "actor/entropy": "high", "timing_s/gen": 1}'],
        ['{"step": 1, "perf/throughput": 1e300, "actor/grad_norm": 1e-300}', '{"step": 2, "perf/throughput": 2e300}'],
    ],
)  # fmt: skip
def test_partial_and_odd_metrics_do_not_break_the_report(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = write_report(tmp_path)[0].read_text()
    assert "nan" not in "".join(re.findall(r'points="[^"]*"|c[xy]="[^"]*"', html))
    Page(html)


def test_torn_lines_are_told(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=4)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "critic/sco')
    assert "metrics.jsonl: 1 line left out" in report_of(run_dir).text


@pytest.mark.parametrize("state", ["no directory", "empty directory", "empty file", "no steps"])
def test_a_directory_without_metrics_is_an_error_that_names_it(tmp_path: Path, state: str) -> None:
    run_dir = tmp_path / "run-7"
    if state != "no directory":
        run_dir.mkdir()
    if state in {"empty file", "no steps"}:
        (run_dir / "metrics.jsonl").write_text("" if state == "empty file" else '{"a": 1}\n')
    with pytest.raises(DataError, match=r"run-7: .*A run directory holds job\.yaml, metrics\.jsonl"):
        write_report(run_dir)


def test_a_report_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=2)
    (run_dir / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"report\.html: "):
        write_report(run_dir)
    assert not list(run_dir.glob(".*.tmp"))


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    html, _ = write_report(write_run(tmp_path, steps=3000))
    assert html.stat().st_size < 1_000_000


def test_a_chat_prompt_is_shown_as_its_messages(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=2)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    (run_dir / "samples.jsonl").write_text(
        json.dumps({"step": 1, "kind": "train", "prompt": prompt, "response": ""}) + "\n"
    )
    text = report_of(run_dir).text
    assert "system: Be brief.\n\nuser: 1 + 1?" in text and "(empty)" in text and "1 train prompts" in text


def test_time_that_no_part_accounts_for_is_shown_as_other() -> None:
    rows = [{"step": step, "timing_s/gen": 2.0, "timing_s/update_actor": 1.0, "timing_s/step": 3.5} for step in (1, 2)]
    (chart,) = make_charts(rows)
    assert [(line.label, line.points[0][1]) for line in chart.series] == [
        ("gen", 2.0),
        ("update_actor", 1.0),
        ("other", 0.5),
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.0, 0.33, [0.0, 0.1, 0.2, 0.3, 0.4]), (0, 60, [0, 20, 40, 60]), (-3, 5, [-4, -2, 0, 2, 4, 6]),
        (2.0, 2.0, [2.0, 2.5, 3.0, 3.5, 4.0]),
    ],
)  # fmt: skip
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("values", "from_zero", "expected"),
    [
        ([0.1, 0.8], False, (0.0, 0.8)), ([0.7, 0.8], False, (0.7, 0.8)), ([0.7, 0.8], True, (0.0, 0.8)),
        ([-0.8, -0.1], False, (-0.8, 0.0)), ([0.0], True, (0.0, 0.0)), ([5.0], False, (4.5, 5.5)), ([-1.0, 2.0], True, (-1.0, 2.0)),
    ],
)  # fmt: skip
def test_an_axis_starts_at_zero_where_noise_must_not_look_like_a_trend(
    values: list[float], from_zero: bool, expected: tuple[float, float]
) -> None:
    assert value_range(values, from_zero) == pytest.approx(expected)


def test_smoothing_keeps_a_straight_line_to_its_ends_and_takes_out_a_ripple() -> None:
    line = [(step, 2.0 * step) for step in range(9)]
    assert smooth(line, 5) == line
    ripple = [(step, float(step % 2)) for step in range(9)]
    assert max(value for _, value in smooth(ripple, 5)[2:-2]) == pytest.approx(0.6)


def test_a_chart_of_one_point_is_a_dot() -> None:
    svg = chart_svg(Chart("kl", "KL", "", [Series("kl", [(3, 0.5)])]))
    assert "<polyline" not in svg and 'class="dot' in svg


def test_a_long_curve_is_thinned_without_losing_a_spike() -> None:
    points = [(step, 9.0 if step == 7777 else 0.1) for step in range(20_000)]
    thinned = bounded_line(Series("norm", points)).points
    assert len(thinned) <= MAX_POINTS and (7777, 9.0) in thinned
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
