"""A complete small GRPO problem, made in code: tokenizer, model, arithmetic prompts and a supervised warm-up.

Invariant: nothing is downloaded, and the same seed on the same machine makes the same bytes.
"""
