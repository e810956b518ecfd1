"""A copy of a model's configuration that is small enough to try out on a CPU at every start.

Invariant: what decides *how* a model computes stays: the order of layer types, multipliers, soft caps, biases, norms,
head widths and rotary settings, the ratio of query to key heads, routing. Only sizes shrink: widths, experts, vocabulary,
and the number of layers to the shortest prefix that holds every kind of layer. A limit in tokens (an attention window, a
chunk, the length from which rotary factors change) keeps its relation to the job's longest sequence: one that the job
never reaches is never reached, one that it passes is passed by every sequence of more than WINDOW_TOKENS.
"""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

WINDOW_TOKENS = 8
SHORTEST_LAYERS, MOST_LAYERS = 4, 24
VOCABULARY, MLP_WIDTH, STATE_WIDTH, EXPERTS, GROUPS = 128, 128, 16, 8, 2

TOKEN_LIMIT = re.compile(r"window|chunk_size|block_size|index_topk|local_attention|original_max_position_embeddings")
PERIOD = re.compile(r"(interval|period|pattern|offset|frequency|freq|stride|every_n|first_k_dense_replace|_step)$")
MLP = re.compile(r"intermediate|^(ffn_dim|n_inner|d_ff|ffn_hidden_size|decoder_ffn_dim|encoder_ffn_dim|mlp_dim)")
EXPERT_COUNTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$|^moe_num_experts$")
EXPERTS_USED = re.compile(r"^(moe_top_?k|num_experts_per_tok(en)?|moe_k|top_k_experts|experts_per_token|moe_topk)$")
STATE = re.compile(r"d_state$|state_size$")
WIDTH = re.compile(r"hidden|embed|width|dim$|d_model")
VOCABULARIES = re.compile(r"^vocab_size|_vocab_size$|^vocab_size_")


def tiny_copy(config: PreTrainedConfig, longest_tokens: int, narrow: bool = True) -> PreTrainedConfig:
    """`config` made small, for a job whose sequences have up to `longest_tokens`. Not `narrow`: widths stay."""
    tiny = copy.deepcopy(config)
    for part in _parts(tiny):
        _cut_layers(part)
        if narrow:
            _cut_widths(part)
        for name, value in list(vars(part).items()):
            _cut(part, name, value, longest_tokens)
    return tiny


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for value in inner for part in _parts(value))]


def _cut(part: PreTrainedConfig, name: str, value: Any, longest_tokens: int) -> None:
    if isinstance(value, dict):  # rotary parameters, also one set a layer type
        setattr(part, name, {k: _limit(k, v, longest_tokens) for k, v in _inner(value, longest_tokens).items()})
    elif not _is_count(value):
        return
    elif VOCABULARIES.search(name):
        setattr(part, name, VOCABULARY)
    elif name.endswith("token_id"):
        setattr(part, name, {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2))
    elif EXPERT_COUNTS.search(name):
        setattr(part, name, min(value, EXPERTS))
    elif EXPERTS_USED.search(name):
        setattr(part, name, min(value, 2))
    elif name in ("n_group", "topk_group"):
        setattr(part, name, min(value, GROUPS))
    else:
        setattr(part, name, _limit(name, value, longest_tokens))


def _inner(value: dict[Any, Any], longest_tokens: int) -> dict[Any, Any]:
    return {
        key: {k: _limit(k, v, longest_tokens) for k, v in inner.items()} if isinstance(inner, dict) else inner
        for key, inner in value.items()
    }


def _limit(name: Any, value: Any, longest_tokens: int) -> Any:
    if not (isinstance(name, str) and TOKEN_LIMIT.search(name) and _is_count(value)):
        return value
    return WINDOW_TOKENS if value < longest_tokens else max(value, longest_tokens, 1024)


def _cut_layers(part: Any) -> None:
    """Keep the first layers: lists of one entry a layer are cut, lists of layer numbers lose those that are gone."""
    total: Any = getattr(part, "num_hidden_layers", None)
    if not _is_count(total):
        return
    by_layer = {
        name: value
        for name, value in vars(part).items()
        if (isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in name))
        and len(value) == total
        and not _are_layer_numbers(name, value)
    }
    kinds = [tuple(str(value[i]) for value in by_layer.values()) for i in range(total)]
    needed = max((kinds.index(kind) + 1 for kind in kinds), default=0)
    periods = [v + 1 for name, v in vars(part).items() if PERIOD.search(name) and _is_count(v) and v < MOST_LAYERS]
    kept = min(total, max(SHORTEST_LAYERS, needed, *periods, 0))
    for name, value in list(vars(part).items()):
        if name in by_layer:
            setattr(part, name, value[:kept])
        elif _are_layer_numbers(name, value):
            setattr(part, name, [v for v in value if v < kept])
    part.num_hidden_layers = kept


def _cut_widths(part: Any) -> None:
    """Fewer heads of the same width, in the same ratio; a hidden width to match; narrow MLPs."""
    heads: Any = getattr(part, "num_attention_heads", None)
    hidden: Any = getattr(part, "hidden_size", None)
    if _is_count(heads) and _is_count(hidden):
        key_name = next((n for n in ("num_key_value_heads", "num_kv_heads") if _is_count(getattr(part, n, None))), None)
        key_heads = getattr(part, key_name) if key_name else heads
        few = min(key_heads, 2)
        count = few * min(max(heads // key_heads, 1), 2)
        if key_name:
            setattr(part, key_name, few)
        width: Any = getattr(part, "head_dim", None)
        part.num_attention_heads = count
        part.hidden_size = narrow = count * (width if _is_count(width) else hidden // heads)
        for name, value in list(vars(part).items()):
            if value == hidden and _is_count(value) and WIDTH.search(name):  # the same width under another name
                setattr(part, name, narrow)
        _cut_states(part, narrow)
    for name, value in list(vars(part).items()):
        if STATE.search(name) and _is_count(value):
            setattr(part, name, min(value, STATE_WIDTH))
        if MLP.search(name):
            if _is_count(value):
                setattr(part, name, min(value, MLP_WIDTH))
            elif isinstance(value, list) and all(_is_count(v) for v in value):
                setattr(part, name, [min(v, MLP_WIDTH) for v in value])


def _cut_states(part: Any, hidden: int) -> None:
    """Heads of state space and linear attention layers; where a model says their width is `expand` x hidden, it stays so."""
    keys: Any = getattr(part, "linear_num_key_heads", None)
    values: Any = getattr(part, "linear_num_value_heads", None)
    if _is_count(keys) and _is_count(values):
        part.linear_num_key_heads, part.linear_num_value_heads = 2, 2 * max(values // keys, 1)
    expand: Any = getattr(part, "mamba_expand", None)
    width: Any = getattr(part, "mamba_d_head", None)
    if isinstance(expand, int | float) and _is_count(width):
        part.mamba_n_heads = max(int(expand * hidden) // width, 1)
        if _is_count(getattr(part, "mamba_d_ssm", None)):
            part.mamba_d_ssm = part.mamba_n_heads * width
        if _is_count(getattr(part, "mamba_n_groups", None)):
            part.mamba_n_groups = 1 if part.mamba_n_heads % part.mamba_n_groups else part.mamba_n_groups


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_layer_numbers(name: str, value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(re.search(r"layer|idx|ids|indices", name))
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        and value == sorted(set(value))
    )
