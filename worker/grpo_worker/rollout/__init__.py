"""The rollout replica: one vLLM engine behind a small HTTP server. Tokens in; tokens, log-probs and weight-version
spans out.

Invariant: what is generated is either delivered with the version of the weights that made each token, or reported as an
error with its prompt's id. Only `engine` (and `plugin`, inside vLLM's workers) import vLLM; nothing here imports the
trainer.
"""
