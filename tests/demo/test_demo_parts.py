import random
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_worker.data.tokenizer import load_tokenizer
from grpo_worker.demo.tasks import RESPONSE_TOKENS, Problem, split_problems, worked_response
from grpo_worker.demo.tokenizer import CHARACTERS, EOS, VOCABULARY, build_tokenizer
from grpo_worker.rewards.base import RewardInput
from grpo_worker.rewards.gsm8k import gsm8k


def test_every_character_is_one_token_and_back() -> None:
    tokenizer = build_tokenizer()
    token_ids = tokenizer(CHARACTERS)["input_ids"]
    assert len(token_ids) == len(CHARACTERS) == len(set(token_ids))
    assert tokenizer.decode(token_ids) == CHARACTERS


def test_a_saved_tokenizer_loads_as_the_worker_loads_it(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    info = load_tokenizer(tmp_path)
    assert len(info.tokenizer) == len(VOCABULARY) == 64
    assert info.eos_ids == (VOCABULARY.index(EOS),) and not info.tokenizer.chat_template and info.notes == ()
    text = "11 14 8 #### 841"
    assert info.tokenizer.decode(info.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_unknown_character_is_the_unknown_token() -> None:
    assert build_tokenizer()("A")["input_ids"] == [VOCABULARY.index("<unk>")]


@pytest.mark.parametrize(
    ("a", "b", "carries", "response"),
    [
        (482, 359, lambda: True, "11 14 8 #### 841"),
        (482, 359, lambda: False, "11 13 7 #### 731"),
        (100, 100, lambda: True, "00 00 2 #### 200"),
        (199, 800, lambda: True, "09 09 9 #### 999"),
        (399, 199, lambda: True, "18 19 5 #### 598"),
        (399, 199, lambda: False, "18 18 4 #### 488"),
        (123, 456, lambda: False, "09 07 5 #### 579"),
    ],
)
def test_a_response_works_column_by_column(a: int, b: int, carries: Callable[[], bool], response: str) -> None:
    assert worked_response(Problem(a, b), carries) == response


def test_right_responses_score_one_and_fit_and_forgotten_carries_score_zero() -> None:
    tokenizer = build_tokenizer()
    problems, _ = split_problems(3, 500, 0)
    for problem in problems:
        response = worked_response(problem)
        assert gsm8k(RewardInput(problem.prompt, response, problem.answer), method="strict").score == 1.0
        assert len(tokenizer(response)["input_ids"]) + 1 == RESPONSE_TOKENS
        careless = worked_response(problem, lambda: False)
        expected = 1.0 if careless == response else 0.0
        assert gsm8k(RewardInput(problem.prompt, careless, problem.answer), method="strict").score == expected


def test_training_and_held_out_problems_are_disjoint_and_fixed_by_the_seed() -> None:
    train, held_out = split_problems(1, 1000, 300)
    assert len(set(train) | set(held_out)) == 1300
    assert (train, held_out) == split_problems(1, 1000, 300)
    assert train != split_problems(2, 1000, 300)[0]
    assert all(problem.a >= 100 and problem.b >= 100 and problem.a + problem.b <= 999 for problem in train)


def test_the_weights_follow_from_the_seed_and_leave_torchs_generator_alone() -> None:
    import torch

    from grpo_worker.demo.model import build_model

    torch.manual_seed(7)
    expected = torch.rand(1).item()
    torch.manual_seed(7)
    one, same, other = build_model(1), build_model(1), build_model(2)
    assert torch.rand(1).item() == expected
    weights = [model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.config.vocab_size == len(VOCABULARY) and one.lm_head.weight is one.model.embed_tokens.weight


def test_the_warm_up_is_a_function_of_its_seed_and_never_shows_held_out_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from grpo_worker.demo import warmup
    from grpo_worker.demo.model import build_model

    shown: list[Problem] = []
    monkeypatch.setattr(
        warmup, "worked_response", lambda problem, carries: shown.append(problem) or worked_response(problem, carries)
    )
    recipe = warmup.Recipe(steps=3, batch_size=8)
    held_out = [
        Problem(a, b) for a in range(100, 900) for b in range(100, 1000 - a) if random.Random(a * b).random() < 0.5
    ]
    results = []
    for _ in range(2):
        model = build_model(1)
        loss = warmup.warm_up(model, build_tokenizer(), held_out, seed=5, recipe=recipe)
        results.append((loss, model.state_dict()["model.norm.weight"].clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert len(shown) == 48 and not set(shown) & set(held_out)


def test_accuracy_looks_at_the_number_behind_the_marker() -> None:
    from grpo_worker.demo.warmup import accuracy

    problem = Problem(123, 456)
    responses = ["09 07 5 #### 579", "0 #### 579", "09 07 5 #### 578", "579", ""]
    assert accuracy([problem] * 5, responses) == pytest.approx(2 / 5)
