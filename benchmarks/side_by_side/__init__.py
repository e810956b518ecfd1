"""TRL, vLLM alone and this project on the same GPU, one after the other in one run."""
