"""Scaled rotary positions in a GGUF file: its keys and its tensors of divisors → rope_scaling."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from refcurv.files.gguf.reading import Contents, read_tensor
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of

Values = dict[str, Any]

LONGROPE: Final = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of divisors, which `phi3` reads."""


def kind_of(values: Values) -> str:
    """The type of rope.scaling. A factor without a type is linear, as llama.cpp reads it.

    Proof: tests/test_gguf_hostile.py::test_a_factor_without_a_type_is_linear
    """
    plain = values.get("rope.scaling.factor") in _PLAIN
    kind: str = values.get("rope.scaling.type", "none" if plain else "linear")
    return kind


_PLAIN: Final = (0, 1, None)
"""Factors that change nothing."""


def scaling(where: str, found: Contents, name: str, values: Values) -> Values:
    """rope_scaling, from the keys of it and from llama3's tensor of factors.

    Proof: tests/test_gguf_hostile.py::test_divisors_that_no_key_reads_are_refused
    """
    kind = kind_of(values)
    factor, original = (
        values.get(f"rope.scaling.{key}") for key in ("factor", "original_context_length")
    )
    listed = name == "phi3" and any(tensor in found.tensors for tensor in LONGROPE)
    if not listed and values.get("rope.scaling.attn_factor", 1) != 1:
        raise ConventionError(f"{where}: rope.scaling.attn_factor is not built yet.")
    for tensor, expected in (("rope_freqs.weight", ("none",)), (LONGROPE[0], ("none", "longrope"))):
        if tensor in found.tensors and kind not in expected:
            raise ConventionError(f"{where}: {tensor} beside rope.scaling.type {kind!r}.")
    if "rope_freqs.weight" in found.tensors:
        return {"rope_scaling": _llama3(where, found, values)}
    if kind == "none" or listed or (kind == "linear" and factor in _PLAIN):
        return {}
    if kind == "longrope":
        raise ConventionError(
            f"{where}: rope.scaling.type is longrope, which is read of phi3 alone, with "
            f"{' and '.join(LONGROPE)}."
        )
    block: Values = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        block["original_max_position_embeddings"] = original
        for ours, theirs in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"rope.scaling.{ours}" in values:
                block[theirs] = values[f"rope.scaling.{ours}"]
    return {"rope_scaling": {key: value for key, value in block.items() if value is not None}}


_LLAMA3: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What every published Llama 3 has; GGUF holds only the divisors that follow from it."""

_DIVISORS: Final = 64 * float(np.finfo(np.float32).eps)
"""Chosen: llama.cpp computes a divisor by about ten float32 operations."""


def _llama3(where: str, found: Contents, values: Values) -> Values:
    """The rule that gives the divisors in rope_freqs.weight, if it is Llama 3's."""
    tensor = found.tensors["rope_freqs.weight"]
    head = values["embedding_length"] // values["attention.head_count"]
    turning = values.get("rope.dimension_count", values.get("attention.key_length", head))
    if tensor.shape != (turning // 2,):
        raise SchemaError(
            f"{where}: rope_freqs.weight has shape {tensor.shape}, and of a head "
            f"{number_of(turning // 2, 'pair')} turn."
        )
    divisors = read_tensor(tensor).astype(np.float64)
    n, factor = len(divisors), float(divisors[-1])
    theta = float(values.get("rope.freq_base", 10_000.0))
    with np.errstate(all="ignore"):  # of a base or factor that is no such number: refused below
        turns = _LLAMA3["original_max_position_embeddings"] / (
            2 * math.pi * theta ** (np.arange(n) / n)
        )
        slow, fast = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
        share = np.clip((turns - slow) / (fast - slow), 0, 1)
        wanted = 1 / ((1 - share) / factor + share)
    if not factor >= 1 or not np.all(np.abs(divisors / wanted - 1) <= _DIVISORS):
        raise ConventionError(
            f"{where}: the divisors in rope_freqs.weight are not those of Llama 3's rule, which "
            "is the only one built."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def require_usual_attention(found: Contents, context: Any, original: Any) -> None:
    """The factor of attention that is written down is the one that follows from the contexts.

    Proof: tests/test_gguf_hostile.py::test_every_key_of_a_longrope_is_read_or_refused
    """
    written = found.get("phi3.rope.scaling.attn_factor")
    where = f"convert: {found.where}"
    if type(context) is not int or type(original) is not int or not 1 < original <= context:
        raise SchemaError(f"{where}: its two context lengths are {context!r} and {original!r}.")
    usual = math.sqrt(1 + math.log(context / original) / math.log(original))
    if isinstance(written, list):  # one for each block
        raise ConventionError(f"{where}: rope.scaling.attn_factor is {written!r:.60}.")
    if written is not None and abs(written / usual - 1) > _DIVISORS:
        raise ConventionError(
            f"{where}: rope.scaling.attn_factor is {written}; longrope has {usual:.6g}."
        )
