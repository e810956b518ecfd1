"""How a job reads its data: plain values, no configuration object.

Invariant: this package knows nothing of the GRPOJob document. The caller maps `data.*` to `DataOptions`; `field` is
the path that messages to a person start with.
"""

from dataclasses import dataclass

from grpo_worker.errors import UsageError


@dataclass(frozen=True)
class DataOptions:
    """Columns, order and length of one set of files (training or validation).

    A key may be a dotted path into struct columns: `reward_model.ground_truth` reads verl's files as they are.
    """

    prompt_key: str = "prompt"
    response_key: str = "response"
    reward_key: str = "reward"
    shuffle: bool = True
    seed: int = 0
    total_epochs: int = 1
    field: str = "data.trainFiles"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"data.seed: {self.seed} is negative. Use 0 or more.")
        if self.total_epochs < 1:
            raise UsageError(f"trainer.totalEpochs: {self.total_epochs} is less than 1. Use 1 or more.")
