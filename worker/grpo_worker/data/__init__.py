"""Data: from Parquet files (or a function) to prompts as token ids, in an order that a checkpoint can go on with.

schema      what a file must look like, checked from its footer
reader      one decoded row group at a time
source      rows in blocks: Parquet files, or a user's function
order       which row comes when: a pure function of seed and epoch
tokenize    chat template, token ids, length limit
tokenizer   the model's tokenizer, loaded and checked
dataset     the whole: scan, iterate from a cursor, restore
gsm8k, reasoning_gym, write   converters that make such files
"""

from grpo_worker.data.dataset import BlockDataset, FunctionDataset, Prompt, PromptDataset, ScanReport
from grpo_worker.data.gsm8k import convert_gsm8k
from grpo_worker.data.options import DataOptions
from grpo_worker.data.order import Cursor
from grpo_worker.data.reasoning_gym import make_reasoning_gym
from grpo_worker.data.tokenize import EncodedPrompt, PromptEncoder
from grpo_worker.data.tokenizer import TokenizerInfo, load_tokenizer

__all__ = [
    "BlockDataset",
    "Cursor",
    "DataOptions",
    "EncodedPrompt",
    "FunctionDataset",
    "Prompt",
    "PromptDataset",
    "PromptEncoder",
    "ScanReport",
    "TokenizerInfo",
    "convert_gsm8k",
    "load_tokenizer",
    "make_reasoning_gym",
]
