"""`spec.data`, `spec.reward`: where prompts come from and who judges the responses."""

from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_worker.config.base import LARGEST_SEED, FunctionPath, Section, field

Truncation = Literal["error", "left", "right", "middle"]
Apply = Literal["auto", "never"]


class ChatTemplate(Section):
    """How messages become text."""

    apply: Apply = field("auto", "auto applies the template when there is one; never joins the messages' texts.")
    text: str | None = field(
        None, "Jinja template in place of the tokenizer's own.", verl="model.custom_chat_template", min_length=1
    )
    kwargs: dict[str, Any] = field(
        dict, "Variables of the template, e.g. `enable_thinking: false`.", verl="data.apply_chat_template_kwargs"
    )
    tools: list[dict[str, Any]] = field(
        list, "Tools that the template tells the model of, as JSON schemas of functions."
    )


class Data(Section):
    """Prompts: files, data sets of the Hugging Face hub, or a function of yours."""

    train_files: list[str] = field(
        list,
        "Training prompts: Parquet, JSON Lines (.jsonl) or CSV files, patterns (data/*.parquet), or data sets of the Hugging Face hub "
        "(hf://OWNER/NAME:CONFIGURATION:SPLIT; without a split, train).",
        verl="data.train_files",
    )
    validation_files: list[str] = field(
        list, "Held-out prompts, named as trainFiles; without any, no validation runs.", verl="data.val_files"
    )
    dataset: FunctionPath | None = field(
        None, "module:function that yields rows (dicts) in place of trainFiles.", verl="data.custom_cls"
    )
    prompt_key: str = field(
        "prompt", "Column of the prompt: text, or a list of chat messages.", verl="data.prompt_key", min_length=1
    )
    response_key: str = field(
        "response",
        "Column of a reference response, which nothing reads: the reward function gets the other columns.",
        min_length=1,
    )
    reward_key: str = field(
        "reward",
        "Column of the ground truth; a dotted path reads a struct. verl's reward_model.ground_truth is found where there is no column of this name.",
        min_length=1,
    )
    train_batch_size: int = field(1024, "Prompts a step.", verl="data.train_batch_size", unit="prompts", ge=1)
    max_prompt_length: int = field(512, "Longest prompt.", verl="data.max_prompt_length", unit="tokens", ge=1)
    max_response_length: int = field(
        1024, "Longest response; generation stops there.", verl="data.max_response_length", unit="tokens", ge=1
    )
    filter_overlong_prompts: bool = field(
        True, "Leave out prompts over the limit (counted in the log).", verl="data.filter_overlong_prompts"
    )
    truncation: Truncation = field(
        "error",
        "What is done with a prompt over the limit when it is not filtered: stop, or cut that side.",
        verl="data.truncation",
    )
    chat_template: ChatTemplate = field(ChatTemplate, "How messages become text.")
    system_prompt: str | None = field(None, "System message put before each prompt (with a chat template).")
    shuffle: bool = field(True, "Shuffle all rows of all files by seed and epoch.", verl="data.shuffle")
    seed: int = field(1, "Seed of the shuffle.", verl="data.seed", ge=0, le=LARGEST_SEED)


RewardName = Annotated[
    str, Field(pattern=r"^(gsm8k|math|exactMatch|format|reasoningGym|judge|remote|[\w./\-]+:[A-Za-z_]\w*)$")
]


class RewardPart(Section):
    """One of several rewards."""

    name: str = field(
        ..., "In metrics (reward/NAME/mean) and samples.", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=63
    )
    function: RewardName = field(..., "As reward.function.")
    options: dict[str, Any] = field(dict, "Keyword arguments of the function.")
    weight: float = field(1.0, "What its score is multiplied with in the sum.")
    sources: list[str] = field(
        list, "Only of rows whose data_source is one of these, or begins with one that ends in *; none: of all rows."
    )


class Reward(Section):
    """Who judges the responses: one function or several, run in killable processes. There is no default: a wrong grader is worse than an error."""

    function: RewardName | None = field(
        None,
        "gsm8k, math, exactMatch, format, reasoningGym, judge (a model behind an OpenAI-compatible API), remote (a service by URL), or module:function.",
        verl="custom_reward_function.path/name",
    )
    options: dict[str, Any] = field(
        dict,
        "Keyword arguments of the function, e.g. `method: flexible`; with parts, of each beside its own.",
        verl="custom_reward_function.reward_kwargs",
    )
    parts: list[RewardPart] = field(
        list,
        "Several in place of one: the score is their weighted sum, the accuracy that of the first that gives one. Each part's own score is in "
        "metrics and samples.",
        max_length=32,
    )
    timeout_seconds: float = field(
        10.0, "Limit of one call; a call over it is killed and counted, never scored 0.", unit="seconds", gt=0
    )
    retry_seconds: float = field(
        600.0, "For so long a call that raises TryAgain is made again, ever further apart; then the sample has failed.",
        unit="seconds", ge=0,
    )  # fmt: skip
    workers: int = field(2, "Processes that score.", verl="reward_model.num_workers", unit="processes", ge=1, le=1024)
    concurrency: int = field(
        256, "Calls that one process has under way at a time, of judge, remote, and functions that are async.",
        unit="calls", ge=1, le=65536,
    )  # fmt: skip
    memory_gib: float | None = field(
        None, "Memory that one of them may write to, then it gets a MemoryError; default half of the container's, shared by them, at least 1.",
        unit="GiB", gt=0, le=65536,
    )  # fmt: skip
    max_failure_ratio: float = field(
        0.5, "A step in which more than this share of the samples could not be scored stops the job.", ge=0, le=1
    )
