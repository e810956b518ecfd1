"""Prompts to token ids: templates, the length limit, and tokenizers that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from grpo_worker.data.tokenize import PromptEncoder, truncate
from grpo_worker.data.tokenizer import describe, load_tokenizer, stop_token_ids
from grpo_worker.errors import DataError, UsageError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "go"}]


def encode(prompt: Any, encoder: PromptEncoder) -> str:
    encoded = encoder.encode(prompt, "train.parquet row 0")
    assert encoded is not None
    assert encoder.tokenizer.decode(encoded.token_ids) == encoded.text
    return encoded.text


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("hi", {}, "<u>hi|<a>"),
        (CHAT, {}, "<u>hi|<a>yo|<u>go|<a>"),
        ("hi", {"system_prompt": "be"}, "<s>be|<u>hi|<a>"),
        ([{"role": "system", "content": "no"}, *CHAT[:1]], {"system_prompt": "be"}, "<s>no|<u>hi|<a>"),
        ([{"role": "user", "content": "hi", "name": None}], {}, "<u>hi|<a>"),
        ("hi", {"template_kwargs": {"suffix": "!"}}, "<u>hi|<a>!"),
        ("hi", {"chat_template": "never"}, "hi"),
        (CHAT, {"chat_template": "never", "system_prompt": "be"}, "be\n\nhi\n\nyo\n\ngo"),
    ],
)
def test_a_prompt_is_rendered_by_the_template(
    chat_tokenizer: Any, prompt: Any, options: dict[str, Any], text: str
) -> None:
    assert encode(prompt, PromptEncoder(chat_tokenizer, 100, **options)) == text


def test_the_ids_are_those_of_the_tokenizer_itself(make_tokenizer: Any) -> None:
    """Special tokens the tokenizer adds, special tokens within the text, and a truncation saved with the tokenizer."""
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>", additional_special_tokens=["<x>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    texts = ["a<x>b", "<eos>", "caf\u00e9 \n", "z" * 50]
    expected = tokenizer(texts)["input_ids"]
    assert expected[0][0] == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=60)
    encoded = PromptEncoder(tokenizer, 100).encode_batch(texts, str)
    assert [prompt.token_ids for prompt in encoded if prompt] == expected
    begun = PromptEncoder(tokenizer, 100).encode("<bos>a", "row 0")
    assert begun and begun.token_ids == tokenizer("a")["input_ids"], "one BOS, whoever wrote it"
    tokenizer.chat_template = "{{ messages[0].content }}"
    templated = PromptEncoder(tokenizer, 100).encode("ab", "row 0")
    assert templated and templated.token_ids == tokenizer("ab", add_special_tokens=False)["input_ids"]


def test_without_a_template_text_is_taken_as_it_is(plain_tokenizer: Any) -> None:
    encoder = PromptEncoder(plain_tokenizer, 100)
    assert encode("3+4=", encoder) == "3+4="
    assert encode(CHAT, encoder) == "hi\n\nyo\n\ngo"


@pytest.mark.parametrize(
    ("side", "limit", "kept"),
    [
        ("left", 4, "6789"),
        ("right", 4, "0123"),
        ("middle", 4, "0189"),
        ("middle", 5, "01789"),
        ("middle", 1, "9"),
        ("left", 1, "9"),
        ("left", 10, "0123456789"),
        ("middle", 10, "0123456789"),
        ("right", 99, "0123456789"),
    ],
)
def test_truncation_cuts_the_named_side(plain_tokenizer: Any, side: Any, limit: int, kept: str) -> None:
    encoder = PromptEncoder(plain_tokenizer, limit, truncation=side, filter_overlong=False)
    encoded = encoder.encode("0123456789", "row 0")
    assert encoded is not None
    assert (encoded.text, len(encoded.token_ids), encoded.truncated) == (kept, min(limit, 10), limit < 10)
    assert "".join(map(chr, truncate([ord(c) for c in "0123456789"], limit, side))) == kept


def test_a_prompt_over_the_limit_names_its_row_its_length_and_the_ways_out(plain_tokenizer: Any) -> None:
    encoder = PromptEncoder(plain_tokenizer, 4, truncation="error", filter_overlong=False)
    with pytest.raises(DataError) as caught:
        encoder.encode_batch(["1234", "12345"], lambda i: f"data.trainFiles[0]: train.parquet row {70 + i}")
    assert str(caught.value) == (
        "data.trainFiles[0]: train.parquet row 71: the prompt has 5 tokens, over data.maxPromptLength = 4. "
        "Raise data.maxPromptLength, set data.filterOverlongPrompts: true to drop such rows, "
        "or data.truncation to left, right or middle."
    )


@pytest.mark.parametrize("truncation", ["error", "left", "right", "middle"])
def test_filtering_comes_before_truncation(plain_tokenizer: Any, truncation: Any) -> None:
    encoder = PromptEncoder(plain_tokenizer, 4, truncation=truncation, filter_overlong=True)
    kept = encoder.encode_batch(["1234", "12345"], str)
    assert kept[0] is not None and kept[1] is None


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        (None, "the prompt is null"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "empty list of messages"),
        (7, "the prompt is a int, not text or a list of {role, content} messages"),
        (["hi"], "message 0 of the prompt is not a {role, content} pair"),
        ([CHAT[0], {"role": "user", "content": None}], "message 1 of the prompt has no text in 'content'"),
        ([{"content": "hi"}], "message 0 of the prompt has no text in 'role'"),
        ([{"role": "user", "content": " "}], "all messages of the prompt are empty"),
        ([{"role": "tool", "content": "x"}], "chat template refuses the prompt (roles: tool): no tools here"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_names_its_row(chat_tokenizer: Any, prompt: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        PromptEncoder(chat_tokenizer, 100).encode_batch(["fine", prompt], lambda i: f"a.parquet row {i}")
    assert str(caught.value).startswith("a.parquet row 1: ") and part in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"max_prompt_tokens": 0}, {"truncation": "top"}, {"chat_template": "always"}], ids=str
)
def test_encoder_options_out_of_range_are_refused(plain_tokenizer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="data\\."):
        PromptEncoder(plain_tokenizer, **{"max_prompt_tokens": 1, **options})


def test_a_saved_tokenizer_loads_with_its_eos_ids_and_template(tmp_path: Path, chat_tokenizer: Any) -> None:
    tokenizer = chat_tokenizer
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, tokenizer.eos_token_id]}))
    info = load_tokenizer(tmp_path)
    assert info.eos_ids == (tokenizer.eos_token_id, 5)
    assert (info.pad_id, info.vocab_size) == (tokenizer.pad_token_id, len(tokenizer))
    assert info.tokenizer.chat_template == tokenizer.chat_template
    assert info.notes == ()
    assert encode("hi", PromptEncoder(info.tokenizer, 100)) == "<u>hi|<a>"


def test_without_a_pad_token_eos_takes_its_place_and_a_note_says_so(tmp_path: Path, make_tokenizer: Any) -> None:
    make_tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    info = load_tokenizer(tmp_path)
    assert info.pad_id == info.eos_ids[0]
    assert info.notes == (f"the tokenizer in {tmp_path} has no pad token: '<eos>' (eos) is used in its place",)


def load_message(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    return str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path, make_tokenizer: Any) -> None:
    make_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    assert load_message(tmp_path) == (
        f"model.path: the tokenizer in {tmp_path} has no eos token, so no response could end. "
        "Set eos_token in tokenizer_config.json."
    )


def test_a_directory_without_a_tokenizer_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    assert "has no tokenizer (it holds model.safetensors)" in load_message(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", "{", "cannot be loaded"),
        ("generation_config.json", "{", "generation_config.json is damaged"),
        ("generation_config.json", '{"eos_token_id": 9999}', "has eos_token_id 9999, but the tokenizer has 98 tokens"),
    ],
)
def test_damaged_tokenizer_files_are_named(
    tmp_path: Path, name: str, content: str, part: str, make_tokenizer: Any
) -> None:
    make_tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    assert part in load_message(tmp_path)


def test_what_ends_a_response_is_one_token_each(tmp_path: Path, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(eos_token="<eos>")
    tokenizer.add_tokens(["</answer>"])
    info = describe(tokenizer, tmp_path)
    end, eos = tokenizer.convert_tokens_to_ids("</answer>"), tokenizer.eos_token_id
    assert stop_token_ids(info, [], []) == [eos]
    assert stop_token_ids(info, ["</answer>", "."], [3, eos]) == [eos, end, tokenizer.convert_tokens_to_ids("."), 3]
    with pytest.raises(DataError, match=r"rollout.stop\[1\]: 'end' is 3 tokens of this tokenizer, not one"):
        stop_token_ids(info, [".", "end"], [])
    with pytest.raises(DataError, match=r"rollout.stopTokenIds\[0\]: 99999 is none of the tokenizer's"):
        stop_token_ids(info, [], [99999])
