"""The coordinator of one job: what is generated when, what it is worth, what the trainer sees, and which weights serve."""
