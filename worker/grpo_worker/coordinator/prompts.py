"""The document's data section as data sets.

Invariant: training prompts are iterated from a cursor; validation prompts are few enough to hold, and always in file order.
"""

import itertools
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo_worker.config import Spec
from grpo_worker.data.dataset import Prompt, PromptDataset, ScanReport
from grpo_worker.data.files import FunctionRows, open_files
from grpo_worker.data.options import DataOptions
from grpo_worker.data.tokenize import PromptEncoder
from grpo_worker.data.tokenizer import TokenizerInfo, load_tokenizer


def open_tokenizer(spec: Spec, model: Path) -> TokenizerInfo:
    """The model's tokenizer, with the document's chat template where it has one. Raises DataError."""
    info = load_tokenizer(model)
    if spec.data.chat_template.text:
        info.tokenizer.chat_template = spec.data.chat_template.text
    return info


def open_training_data(spec: Spec, tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
    """Opened, checked and scanned. Raises DataError."""
    data = spec.data
    options = _options(spec)
    rows = [FunctionRows(data.dataset, options)] if data.dataset else open_files(data.train_files, options)
    dataset = PromptDataset(rows, options, _encoder(spec, tokenizer))
    dataset.scan()
    dataset.steps_per_epoch(data.train_batch_size)  # raises when a batch is larger than the data
    return dataset


def open_validation_prompts(spec: Spec, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], ScanReport | None]:
    """All validation prompts, or the first `rollout.validation.maxPrompts`, and what their files held. Raises DataError."""
    if not spec.data.validation_files:
        return [], None
    options = replace(_options(spec), shuffle=False, total_epochs=1, field="data.validationFiles")
    rows = open_files(spec.data.validation_files, options)
    dataset = PromptDataset(rows, options, _encoder(spec, tokenizer))
    return list(itertools.islice(dataset.iterate(), spec.rollout.validation.max_prompts)), dataset.scan()


def _options(spec: Spec) -> DataOptions:
    data = spec.data
    return DataOptions(
        prompt_key=data.prompt_key,
        response_key=data.response_key,
        reward_key=data.reward_key,
        shuffle=data.shuffle,
        seed=data.seed,
        total_epochs=spec.trainer.total_epochs,
    )


def _encoder(spec: Spec, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    data, template = spec.data, spec.data.chat_template
    return PromptEncoder(
        tokenizer,
        data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong=data.filter_overlong_prompts,
        chat_template=template.apply,
        system_prompt=data.system_prompt,
        template_kwargs={**template.kwargs, **({"tools": template.tools} if template.tools else {})},
    )
