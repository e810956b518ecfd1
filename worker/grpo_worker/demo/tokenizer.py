"""A tokenizer of single characters.

Invariant: one character is one token and back, so a text over `CHARACTERS` survives encoding and decoding unchanged.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=#().,:;?!<>%$&@_'\" \n"
VOCABULARY = (PAD, EOS, UNK, *CHARACTERS)
MAX_CONTEXT_TOKENS = 256


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """No BOS token and no chat template: a prompt is its characters. Anything outside `CHARACTERS` is `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT_TOKENS,
    )
