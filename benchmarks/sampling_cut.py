"""What a nucleus or a top-k does to the importance weights between engine and trainer, by the engine's `logprobs_mode`.

Invariant: both modes answer the same prompts with the same seeds, and the trainer's log-probs are those of plain
Transformers in float32, of the whole vocabulary. A weight is exp(trainer - engine) of a token, or of a whole answer.
Prints one JSON object.

    python -m benchmarks.sampling_cut --model DIRECTORY
"""

import argparse
import gc
import json
import math
import os
from typing import Any

CUTS: dict[str, dict[str, Any]] = {"topP 0.95": {"top_p": 0.95}, "topK 20": {"top_k": 20}}
MODES = ("processed_logprobs", "raw_logprobs")
PROMPTS = ("Tell a story about a lighthouse.", "What is a healthy breakfast?")

Answers = dict[str, list[tuple[list[int], list[int], list[float]]]]  # by cut: prompt, answer, log-probs


def generate(model: str, mode: str, tokens: int, samples: int) -> Answers:
    """vLLM's answers under each cut."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", max_model_len=tokens + 64, logprobs_mode=mode, seed=1, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]
    answers: Answers = {}
    for name, cut in CUTS.items():
        parameters = [
            SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, seed=seed, **cut)
            for seed in range(samples)
        ]
        requests: list[Any] = [{"prompt_token_ids": chat} for chat in chats for _ in parameters]
        outputs = llm.generate(requests, parameters * len(chats), use_tqdm=False)
        answers[name] = []
        for output in outputs:
            (answer,) = output.outputs
            log_probs = [
                entry[token].logprob
                for token, entry in zip(answer.token_ids, answer.logprobs or (), strict=True)
                if entry
            ]
            answers[name].append((list(output.prompt_token_ids or ()), list(answer.token_ids), log_probs))
    del llm
    gc.collect()
    return answers


def weights(model: str, answers: Answers) -> dict[str, dict[str, float]]:
    """Mean weight of a token, and of an answer, by cut."""
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for name, batch in answers.items():
        of_tokens, of_answers = [], []
        for prompt, answer, log_probs in batch:
            with torch.no_grad():
                logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            trainer = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            log_weight = trainer - torch.tensor(log_probs)
            of_tokens.append(float(log_weight.exp().mean()))
            of_answers.append(math.exp(float(log_weight.sum())))
        found[name] = {"token": sum(of_tokens) / len(of_tokens), "answer": sum(of_answers) / len(of_answers)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with a chat template")
    parser.add_argument("--tokens", type=int, default=1000, help="length of each answer")
    parser.add_argument("--samples", type=int, default=2, help="answers to each prompt")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    answers = {mode: generate(arguments.model, mode, arguments.tokens, arguments.samples) for mode in MODES}
    same = [[answer for _, answer, _ in batch] for batch in answers[MODES[0]].values()] == [
        [answer for _, answer, _ in batch] for batch in answers[MODES[1]].values()
    ]
    result = {"tokens": arguments.tokens, "answers": arguments.samples * len(PROMPTS), "same_answers": same}
    print(json.dumps(result | {mode: weights(arguments.model, answers[mode]) for mode in MODES}, indent=2))


if __name__ == "__main__":
    main()
