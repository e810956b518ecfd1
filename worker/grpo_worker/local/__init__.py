"""`grpo run`: the roles of a job as processes of this machine, supervised as the operator supervises pods."""
