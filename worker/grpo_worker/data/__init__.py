"""Data: from files, a data set's name or a function to prompts as token ids, in an order that a checkpoint can go on with.

files       what a name stands for, opened by `datasets`
columns     which values of a row are the prompt and the ground truth
order       which row comes when: a pure function of seed and epoch
tokenize    chat template, token ids, length limit
tokenizer   the model's tokenizer, loaded and checked
dataset     the whole: scan, iterate from a cursor, restore
gsm8k, reasoning_gym, write   converters that make such files
"""

from grpo_worker.data.dataset import Prompt, PromptDataset, ScanReport
from grpo_worker.data.files import FunctionRows, open_files
from grpo_worker.data.gsm8k import convert_gsm8k
from grpo_worker.data.options import DataOptions
from grpo_worker.data.order import Cursor
from grpo_worker.data.reasoning_gym import make_reasoning_gym
from grpo_worker.data.tokenize import EncodedPrompt, PromptEncoder
from grpo_worker.data.tokenizer import TokenizerInfo, load_tokenizer

__all__ = [
    "Cursor",
    "DataOptions",
    "EncodedPrompt",
    "FunctionRows",
    "Prompt",
    "PromptDataset",
    "PromptEncoder",
    "ScanReport",
    "TokenizerInfo",
    "convert_gsm8k",
    "load_tokenizer",
    "make_reasoning_gym",
    "open_files",
]
