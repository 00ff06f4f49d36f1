"""Keys of a config.json ↔ rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    required,
    same,
)
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of
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
    Scaling.DYNAMIC: ("factor",),
    Scaling.LONGROPE: (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}
"""The keys of each kind of scaling, beside rope_type, rope_theta and partial_rotary_factor."""

NOT_BUILT: Final = ("axial", "dynamic", "longrope", "mrope", "proportional", "su", "yarn")
"""Kinds of rotary positions in published models; refused where a family does not compute them."""

_BLOCKS: Final = ("rope_parameters", "rope_scaling")
_NESTED: Final = (FULL, SLIDING)
_CONTEXT: Final = "max_position_embeddings"
_ORIGINAL: Final = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """What a family calls its kinds of scaling.

    Fields:
        built: the kinds that transformers computes for the family.
        names: other names of a kind → the name that it has elsewhere.
        original: the trained context where no key gives it. With it the family has the key
            original_max_position_embeddings beside rope_scaling, and it is longrope's.
    """

    built: tuple[Scaling, ...] = tuple(Scaling)
    names: Mapping[str, str] = field(default_factory=dict)
    original: int | None = None


ALL: Final = Kinds()


def rope(
    theta_key: str = "rope_theta",
    theta: float = 10_000.0,
    partial_key: str | None = None,
    partial: float = 1.0,
    kinds: Kinds = ALL,
) -> Rule:
    """Rotary positions, in the keys of transformers 5 or the older ones.

    Args:
        theta_key: The older key of the base.
        theta: The base, if no key gives one.
        partial_key: The older key of the rotated share of a head's width; None: all of it rotates.
        partial: The share, if no key gives one.
        kinds: The kinds of scaling.
    """

    def read(data: Values, found: Fields) -> Fields:
        top = {"rope_theta": data.get(theta_key)}
        if partial_key is not None:
            top["partial_rotary_factor"] = data.get(partial_key)
        usual = {"rope_theta": theta, "partial_rotary_factor": partial}
        parameters, scaling = (_block(data.get(name), name) for name in _BLOCKS)
        blocks = [top, _not_truncated(parameters), _not_truncated(scaling)]
        fields = _rope_fields(data, found, usual, blocks, kinds)
        _require_read(parameters, scaling, top)
        if partial_key is None and fields["rope_width"] is not None:
            raise ConventionError("partial_rotary_factor below 1 is not of this family")
        return fields

    def write(config: ModelConfig) -> Fields:
        if config.rope_theta is None:
            return {}
        block = _rope_block(config)
        share = block.pop("partial_rotary_factor")
        older: Fields = {theta_key: config.rope_theta, **_context(config)}
        if partial_key is not None:
            block["partial_rotary_factor"] = older[partial_key] = share
        if config.rope_scaling is not None:
            older["rope_scaling"] = block
            if kinds.original is not None:
                older[_ORIGINAL] = config.rope_scaling.original
        return older | {"rope_parameters": block}

    keys = [theta_key, *_BLOCKS, _CONTEXT]
    keys += [partial_key] if partial_key is not None else []
    return Rule(tuple(keys if kinds.original is None else [*keys, _ORIGINAL]), read, write)


def rope_by_layer(theta: float, local: float, local_key: str | None = None) -> Rule:
    """Rotary positions of attention without a window, and others with one; after the windows.

    rope_parameters has a block for each kind of attention; rope_scaling is about full attention.

    Args:
        theta: The base without a window, if no key gives one.
        local: The base with a window, if no key gives one.
        local_key: The older key of that base.
    """

    def read(data: Values, found: Fields) -> Fields:
        nested = _block(data.get("rope_parameters"), "rope_parameters")
        for name in nested:
            if name not in _NESTED:
                raise ConventionError(f"rope_parameters has an unknown key {name!r:.40}")
        full, sliding = (_block(nested.get(name), name) for name in _NESTED)
        top = {"rope_theta": data.get("rope_theta")}
        scaling = _block(data.get("rope_scaling"), "rope_scaling")
        wide = [top, scaling, full]
        main = _rope_fields(data, found, {"rope_theta": theta}, wide, ALL)
        _require_nested(main["rope_scaling"], scaling)
        narrow = [{"rope_theta": data.get(local_key) if local_key else None}, sliding]
        other = _rope_fields(data, found, {"rope_theta": local}, narrow, ALL)
        windows = found.get("windows", ())
        if not windows or main == other:
            return main
        if other["rope_scaling"] is not None:
            raise ConventionError(
                f"{SLIDING} and {FULL} have different rotary positions, and those of {SLIDING} are "
                "scaled; refcurv scales those of full attention, or all alike"
            )
        if not local_key and data.get("rope_theta") not in (None, local) and not sliding:
            raise ConventionError(
                f"rope_theta is {data['rope_theta']!r:.40}: releases of transformers differ on "
                f"whether {SLIDING} has it too; say so in rope_parameters"
            )
        rotary = tuple("local" if window else "main" for window in windows)
        return main | {"local_theta": other["rope_theta"], "rotary": rotary}

    def write(config: ModelConfig) -> Fields:
        if config.rope_theta is None:
            return {}
        main = _rope_block(config)
        del main["partial_rotary_factor"]
        other = main
        if config.local_theta is not None:
            other = {"rope_type": _PLAIN, "rope_theta": config.local_theta}
        return {"rope_parameters": {FULL: main, SLIDING: other}, **_context(config)}

    keys = ("rope_theta", *_BLOCKS, _CONTEXT)
    return Rule(keys if local_key is None else (*keys, local_key), read, write)


def still_blocks() -> Rule:
    """SmolLM3's keys: no_rope_layers has a 0 for each block without rotary positions, else a 1.

    Without them it is every block of number no_rope_layer_interval, by default four.
    """
    listed, interval = "no_rope_layers", "no_rope_layer_interval"

    def read(data: Values, found: Fields) -> Fields:
        turning = data.get(listed)
        if turning is None:
            turning = [int(turns(i, data)) for i in range(found["layers"])]
        good = isinstance(turning, list) and len(turning) == found["layers"]
        if not good or any(type(one) is not int or one not in (0, 1) for one in turning):
            raise SchemaError(
                f"{listed} must have a 1 or a 0 for each of "
                f"{number_of(found['layers'], 'block')}; got {turning!r:.60}"
            )
        return {"rotary": tuple("main" if one else "none" for one in turning)}

    def write(config: ModelConfig) -> Fields:
        rotary = config.rotary or ("main",) * config.layers
        return {listed: [int(kind != "none") for kind in rotary]}

    return Rule((listed, interval), read, write)


def turns(i: int, data: Values) -> bool:
    """Has SmolLM3's block i rotary positions? For config.json that `still_blocks` has read."""
    key = "no_rope_layer_interval"
    listed = data.get("no_rope_layers")
    return bool((i + 1) % natural({key: 4, **data}, key) if listed is None else listed[i])


def _block(value: object, name: str) -> Values:
    if value is not None and not isinstance(value, dict):
        raise SchemaError(f"{name} must be an object; got {value!r:.40}")
    return value or {}


def _require_read(parameters: Values, scaling: Values, top: Values) -> None:
    """Beside rope_scaling, rope_parameters must say nothing new: transformers does not read it."""
    told = _merged(top, scaling)
    for key, value in _merged(parameters).items() if scaling else ():
        if key not in told:
            raise ConventionError(
                f"{key} is {value!r:.40} in rope_parameters alone, which transformers does not "
                "read where rope_scaling is there too: move all of one block into the other"
            )


def _not_truncated(block: Values) -> Values:
    """Yarn's truncate: null is false for transformers, and an absent key is true."""
    yarn = Scaling.YARN in (block.get("rope_type"), block.get("type"))
    null = block.get("truncate", True) is None
    return {**block, "truncate": False} if yarn and null else block


def _require_nested(found: RopeScaling | None, scaling: Values) -> None:
    """Refuse what transformers 5 does not read where each kind of attention has its block."""
    kind = scaling.get("type")
    if kind not in (None, _PLAIN) and scaling.get("rope_type") is None:
        raise ConventionError(
            f"rope_scaling has its kind, {kind!r:.40}, as type, which transformers 5 does not read "
            "in this family (4 did): write rope_type, or leave rope_scaling out"
        )
    if found is not None and not found.truncate:
        raise ConventionError(
            "truncate is false, which transformers does not read in a block of one kind of "
            "attention: it computes with true. Write true, or leave it out"
        )


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


def _require_built(blocks: Sequence[Values], kinds: Kinds) -> None:
    """Refuse a kind that is known and not built, under either key (releases may write both)."""
    found = [block.get(key) for block in blocks for key in ("rope_type", "type")]
    found += ["mrope" for block in blocks if block.get("mrope_section") is not None]
    for kind in found:
        if kind in NOT_BUILT and kind not in kinds.built:
            raise ConventionError(
                f"rope_type is {kind!r}, which is not built yet; built are "
                f"{', '.join([_PLAIN, *kinds.built])}"
            )


def _renamed(block: Values, kinds: Kinds) -> Fields:
    """A block in which the kind has the name that it has elsewhere."""
    named = dict(block)
    for key in ("rope_type", "type"):
        if isinstance(named.get(key), str):
            named[key] = kinds.names.get(named[key], named[key])
    return named


def _rope_fields(
    data: Values, found: Fields, usual: Fields, blocks: Sequence[Values], kinds: Kinds
) -> Fields:
    """The fields of a ModelConfig that some blocks describe; `usual`: of absent keys."""
    blocks = [_renamed(block, kinds) for block in blocks]
    _require_built(blocks, kinds)
    block = {"partial_rotary_factor": 1.0, **usual, **_merged(*blocks)}
    kind = block.get("rope_type", _PLAIN)
    if kinds.original is not None and kind == Scaling.LONGROPE:
        block = _with_original(block, data.get(_ORIGINAL), kinds.original)
    base, share = (number(block, key) for key in ("rope_theta", "partial_rotary_factor"))
    if share > 1:
        raise SchemaError(f"partial_rotary_factor must be at most 1; got {share:g}")
    head_width = found["head_width"]
    turning = int(head_width * share)
    fields: Fields = {"rope_theta": base, "rope_scaling": None}
    fields["rope_width"] = None if turning == head_width else turning
    known = {_PLAIN: (), **{str(k): _KINDS[k] for k in kinds.built}}
    if not isinstance(kind, str) or kind not in known:
        raise ConventionError(f"rope_type is {kind!r:.40}; known are {', '.join(known)}")
    for key, value in block.items():
        if key not in (*known[kind], "rope_type", "rope_theta", "partial_rotary_factor"):
            raise ConventionError(
                f"{key} is {value!r:.40}, which refcurv does not compute beside rope_type {kind!r}"
            )
    if kind != _PLAIN:
        fields["rope_scaling"] = _scaling(Scaling(kind), block, data.get(_CONTEXT))
    return fields


def _with_original(block: Fields, top: object, usual: int) -> Fields:
    """`block` with the trained context, which transformers takes from the top level or `usual`."""
    merged = _merged(block, {_ORIGINAL: top})
    if top is None and not same(merged.setdefault(_ORIGINAL, usual), usual):
        raise ConventionError(
            f"{_ORIGINAL} is {merged[_ORIGINAL]!r:.40} beside rope_type alone, where transformers "
            f"takes {usual} all the same: write it at the top level too"
        )
    return merged


def _scaling(kind: Scaling, block: Fields, context: object) -> RopeScaling:
    if kind is Scaling.LONGROPE:
        return _longrope(block, context)
    factor = number(block, "factor")
    if kind is Scaling.LINEAR:
        return RopeScaling(kind=kind, factor=factor)
    if kind is Scaling.DYNAMIC:
        original = natural({_CONTEXT: context}, _CONTEXT)
        return RopeScaling(kind=kind, factor=factor, original=original)
    original = natural({_ORIGINAL: context, **block}, _ORIGINAL)
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


def _longrope(block: Fields, context: object) -> RopeScaling:
    """`factor`, by default the context over the trained one, gives attention_factor's default."""
    original = natural({_ORIGINAL: context, **block}, _ORIGINAL)
    short, long = (_divisors(block, key) for key in ("short_factor", "long_factor"))
    attention = block.get("attention_factor")
    if attention is None:
        factor = block.get("factor")
        if factor is None:
            factor = natural({_CONTEXT: context}, _CONTEXT) / original
        factor, attention = number({"factor": factor}, "factor"), 1.0
        if factor > 1:
            if original == 1:
                raise SchemaError(f"{_ORIGINAL} must be above 1 for longrope; got 1")
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        kind=Scaling.LONGROPE,
        original=original,
        attention=number({"attention_factor": attention}, "attention_factor"),
        short=short,
        long=long,
    )


def _divisors(block: Fields, key: str) -> tuple[float, ...]:
    values = required(block, key)
    if not isinstance(values, list):
        raise SchemaError(f"{key} must be a list of numbers; got {values!r:.40}")
    return tuple(number({key: value}, key) for value in values)


def _context(config: ModelConfig) -> Fields:
    """The key that dynamic scaling takes the trained context from."""
    s = config.rope_scaling
    return {_CONTEXT: s.original} if s is not None and s.kind is Scaling.DYNAMIC else {}


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
        _ORIGINAL: s.original,
        "low_freq_factor": s.slow,
        "high_freq_factor": s.fast,
        "beta_slow": s.slow,
        "beta_fast": s.fast,
        "attention_factor": s.attention,
        "truncate": s.truncate,
        "short_factor": list(s.short),
        "long_factor": list(s.long),
    }
    keys = [key for key in _KINDS[s.kind] if s.kind is not Scaling.LONGROPE or key != "factor"]
    return block | {"rope_type": str(s.kind)} | {key: values[key] for key in keys}
