"""The `grpo` command."""
