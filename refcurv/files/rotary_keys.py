"""Keys of a config.json ↔ rotary positions."""

from __future__ import annotations

import math
from typing import Final

from refcurv.files.keys import (
    FULL,
    SLIDING,
    Fields,
    Rule,
    Values,
    flag,
    natural,
    number,
    same,
)
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.model.config import ModelConfig, RopeScaling, Scaling

_PLAIN: Final = "default"
_KINDS: Final = {
    Scaling.LINEAR: ("factor",),
    Scaling.LLAMA3: (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    Scaling.YARN: (
        "factor",
        "original_max_position_embeddings",
        "beta_slow",
        "beta_fast",
        "attention_factor",
        "truncate",
    ),
}
"""The keys of each kind of scaling, beside rope_type, rope_theta and partial_rotary_factor."""

NOT_BUILT: Final = ("axial", "dynamic", "longrope", "mrope", "proportional", "su", "yarn")
"""Kinds of rotary positions in published models; refused where a family does not compute them."""

_BLOCKS: Final = ("rope_parameters", "rope_scaling")
_NESTED: Final = (FULL, SLIDING)


def rope(
    theta_key: str = "rope_theta",
    theta: float = 10_000.0,
    partial_key: str | None = None,
    partial: float = 1.0,
    scalings: tuple[Scaling, ...] = tuple(Scaling),
    nested: bool = False,
) -> Rule:
    """Rotary positions, in the keys of transformers 5 or the older ones.

    Args:
        theta_key: The older key of the base.
        theta: The base, if no key gives one.
        partial_key: The older key of the rotated share of a head's width; None: all of it rotates.
        partial: The share, if no key gives one.
        scalings: The kinds of scaling that transformers computes for the family.
        nested: rope_parameters has a block for each kind of attention, and rope_scaling is about
            full attention.
    """

    def read(data: Values, found: Fields) -> Fields:
        blocks = {name: _block(data.get(name), name) for name in _BLOCKS}
        top = {"rope_theta": data.get(theta_key)}
        if partial_key is not None:
            top["partial_rotary_factor"] = data.get(partial_key)
        context = data.get("max_position_embeddings")

        def one(*of: Values) -> Fields:
            _require_built(of, scalings)
            merged = {"rope_theta": theta, "partial_rotary_factor": partial, **_merged(top, *of)}
            fields = _rope_fields(merged, found["head_width"], scalings, context)
            if partial_key is None and fields["rope_width"] is not None:
                raise ConventionError("partial_rotary_factor below 1 is not of this family")
            return fields

        if not nested:
            return one(*blocks.values())
        for name in blocks["rope_parameters"]:
            if name not in _NESTED:
                raise ConventionError(f"rope_parameters has an unknown key {name!r}")
        full, sliding = (_block(blocks["rope_parameters"].get(n), n) for n in _NESTED)
        wide, narrow = one(full, blocks["rope_scaling"]), one(sliding)
        if wide != narrow:
            raise ConventionError(
                "full and sliding attention have different rotary positions; refcurv has one for "
                "all blocks"
            )
        return wide

    def write(config: ModelConfig) -> Fields:
        if config.rope_theta is None:
            return {}
        block = _rope_block(config)
        share = block.pop("partial_rotary_factor")
        if nested:
            return {"rope_parameters": {name: block for name in _NESTED}}
        older: Fields = {theta_key: config.rope_theta}
        if partial_key is not None:
            block["partial_rotary_factor"] = older[partial_key] = share
        if config.rope_scaling is not None:
            older["rope_scaling"] = block
        return older | {"rope_parameters": block}

    keys = (theta_key, *_BLOCKS, "max_position_embeddings")
    return Rule(keys if partial_key is None else (*keys, partial_key), read, write)


def _block(value: object, name: str) -> Values:
    if value is not None and not isinstance(value, dict):
        raise SchemaError(f"{name} must be an object; got {value!r:.40}")
    return value or {}


def _merged(*blocks: Values) -> Fields:
    """All blocks as one. A null is skipped; a key that occurs twice must have one value."""
    merged: Fields = {}
    for block in blocks:
        for key, value in block.items():
            name = "rope_type" if key == "type" else key
            if value is None:
                continue
            if name in merged and not same(merged[name], value):
                raise ConventionError(
                    f"{name} is given as {merged[name]!r:.40} and as {value!r:.40}; which one is "
                    "meant?"
                )
            merged[name] = value
    return merged


def _require_built(blocks: tuple[Values, ...], scalings: tuple[Scaling, ...]) -> None:
    """Refuse a kind that is known and not built, under either key (releases may write both)."""
    kinds = [block.get(key) for block in blocks for key in ("rope_type", "type")]
    kinds += ["mrope" for block in blocks if block.get("mrope_section") is not None]
    for kind in kinds:
        if kind in NOT_BUILT and kind not in scalings:
            raise ConventionError(
                f"rope_type is {kind!r}, which is not built yet; built are "
                f"{', '.join([_PLAIN, *scalings])}"
            )


def _rope_fields(
    block: Fields, head_width: int, scalings: tuple[Scaling, ...], context: object
) -> Fields:
    """The fields of a ModelConfig that one merged block describes."""
    base, share = (number(block, key) for key in ("rope_theta", "partial_rotary_factor"))
    if share > 1:
        raise SchemaError(f"partial_rotary_factor must be at most 1; got {share:g}")
    turning = int(head_width * share)
    fields: Fields = {"rope_theta": base, "rope_scaling": None}
    fields["rope_width"] = None if turning == head_width else turning
    kind = block.get("rope_type", _PLAIN)
    kinds = {_PLAIN: (), **{str(k): _KINDS[k] for k in scalings}}
    if not isinstance(kind, str) or kind not in kinds:
        raise ConventionError(f"rope_type is {kind!r:.40}; known are {', '.join(kinds)}")
    for key, value in block.items():
        if key not in (*kinds[kind], "rope_type", "rope_theta", "partial_rotary_factor"):
            raise ConventionError(
                f"{key} is {value!r:.40}, which refcurv does not compute beside rope_type {kind!r}"
            )
    if kind != _PLAIN:
        fields["rope_scaling"] = _scaling(Scaling(kind), block, context)
    return fields


def _scaling(kind: Scaling, block: Fields, context: object) -> RopeScaling:
    factor = number(block, "factor")
    if kind is Scaling.LINEAR:
        return RopeScaling(kind=kind, factor=factor)
    key = "original_max_position_embeddings"
    original = natural({key: context, **block}, key)
    if kind is Scaling.LLAMA3:
        slow, fast = number(block, "low_freq_factor"), number(block, "high_freq_factor")
        return RopeScaling(kind=kind, factor=factor, original=original, slow=slow, fast=fast)
    attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return RopeScaling(
        kind=kind,
        factor=factor,
        original=original,
        slow=number({"beta_slow": 1.0, **block}, "beta_slow"),
        fast=number({"beta_fast": 32.0, **block}, "beta_fast"),
        attention=number({"attention_factor": attention, **block}, "attention_factor"),
        truncate=flag(block, "truncate", True),
    )


def _rope_block(config: ModelConfig) -> Fields:
    """The reverse of `_rope_fields`."""
    E = config.head_width
    turning = config.rope_width or E
    share = turning / E
    if int(E * share) != turning:  # rounded to below
        share = math.nextafter(share, 1)
    block: Fields = {
        "rope_type": _PLAIN,
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": share,
    }
    s = config.rope_scaling
    if s is None:
        return block
    values = {
        "factor": s.factor,
        "original_max_position_embeddings": s.original,
        "low_freq_factor": s.slow,
        "high_freq_factor": s.fast,
        "beta_slow": s.slow,
        "beta_fast": s.fast,
        "attention_factor": s.attention,
        "truncate": s.truncate,
    }
    return block | {"rope_type": str(s.kind)} | {key: values[key] for key in _KINDS[s.kind]}
