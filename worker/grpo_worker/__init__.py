"""Data plane of GRPO training: the coordinator, the FSDP trainer and the vLLM rollout server of one GRPOJob."""

__version__ = "0.1.0"
