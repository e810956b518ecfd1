"""Presets: the defaults of published recipes.

Invariant: a preset only fills fields that the document leaves out; so the fields named here carry no default in the CRD (the API
server would otherwise fill them in, and nobody could tell its defaults from a person's choice).
"""

from collections.abc import Mapping
from typing import Any

# Paths below `spec`, by preset.
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300: group-normalised rewards, per-sequence mean, KL to the reference in the loss.
    "GRPO": {
        "algorithm.advantageEstimator": "grpo",
        "algorithm.normAdvByStd": True,
        "actor.lossAggMode": "seq-mean-token-mean",
        "actor.useKLLoss": True,
        "actor.klLossCoef": 0.04,
        "actor.klLossType": "low_var_kl",
    },
    # arXiv 2503.20783: no division by the standard deviation, constant length divisor, no KL.
    "DrGRPO": {
        "algorithm.advantageEstimator": "grpo",
        "algorithm.normAdvByStd": False,
        "actor.lossAggMode": "seq-mean-token-sum-norm",
        "actor.useKLLoss": False,
    },
    # arXiv 2503.14476: clip-higher, token-level loss, dynamic sampling, soft overlong punishment, no KL.
    "DAPO": {
        "algorithm.advantageEstimator": "grpo",
        "algorithm.normAdvByStd": True,
        "algorithm.filterGroups.enable": True,
        "algorithm.overlongBuffer.enable": True,
        "actor.clipRatioLow": 0.2,
        "actor.clipRatioHigh": 0.28,
        "actor.lossAggMode": "token-mean",
        "actor.useKLLoss": False,
    },
    # arXiv 2507.18071: sequence-level ratio with its much narrower clip range.
    "GSPO": {
        "algorithm.advantageEstimator": "grpo",
        "actor.lossMode": "gspo",
        "actor.lossAggMode": "seq-mean-token-mean",
        "actor.clipRatioLow": 3e-4,
        "actor.clipRatioHigh": 4e-4,
        "actor.useKLLoss": False,
    },
    # arXiv 2506.13585, with the cap of 5 on the weight from arXiv 2510.13786; low = 1 leaves the lower side open.
    "CISPO": {
        "algorithm.advantageEstimator": "grpo",
        "actor.lossMode": "cispo",
        "actor.lossAggMode": "token-mean",
        "actor.clipRatioLow": 1.0,
        "actor.clipRatioHigh": 4.0,
        "actor.useKLLoss": False,
    },
}

PRESET_PATHS = frozenset(path for values in PRESETS.values() for path in values)


def apply_preset(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the raw `spec` with the fields of its preset filled in where the document leaves them out."""
    filled: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in spec.items()}
    algorithm = filled.get("algorithm")
    name = algorithm.get("preset") if isinstance(algorithm, dict) else None
    for path, value in PRESETS.get(name, {}).items() if isinstance(name, str) else ():
        *parents, last = path.split(".")
        node: Any = filled
        for key in parents:
            child = node.get(key)
            if child is not None and not isinstance(child, Mapping):
                break  # wrong type: validation will say so
            node[key] = dict(child or {})
            node = node[key]
        else:
            node.setdefault(last, value)
    return filled
