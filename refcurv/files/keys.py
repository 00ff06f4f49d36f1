"""Keys of a config.json ↔ fields of a ModelConfig: the rules that a family is written in.

A rule knows its keys and works in both directions. It never guesses: a value that it does not
know is an error, raised as a sentence about the key; who reads the file puts its name in front.
A key that is absent or null has transformers' own default, where there is a harmless one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from refcurv.law.checks import ConventionError, SchemaError
from refcurv.model.config import LARGEST, Activation, Image, ModelConfig, RopeScaling, Scaling

Values = Mapping[str, Any]
Fields = dict[str, Any]

_MOST: Final = 2**31 - 1
_MOST_LAYERS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Some keys and what they mean.

    Fields: keys; read (config.json, the fields found by earlier rules) → fields; write
    ModelConfig → config.json. Where ModelConfig says what the keys cannot, `write` writes
    something else or nothing: the exporter reads its text back and compares.
    """

    keys: tuple[str, ...]
    read: Callable[[Values, Fields], Fields]
    write: Callable[[ModelConfig], Fields]


# ------------------------------------------------------------------ values


def required(data: Values, key: str) -> Any:
    """The value of a key that must be there."""
    if data.get(key) is None:
        raise SchemaError(f"lacks the key {key!r}")
    return data[key]


def natural(data: Values, key: str, most: int = _MOST) -> int:
    """A positive integer; neither true nor 1.0 is one."""
    value = required(data, key)
    if type(value) is not int or not 1 <= value <= most:
        raise SchemaError(f"{key} must be a positive integer up to {most}; got {value!r:.40}")
    return value


def number(data: Values, key: str, least: float = 0.0) -> float:
    """A finite number above `least`."""
    value = required(data, key)
    if type(value) not in (int, float) or not least < value <= LARGEST:
        raise SchemaError(f"{key} must be a finite number above {least:g}; got {value!r:.40}")
    return float(value)


def flag(data: Values, key: str, default: bool) -> bool:
    """True or false."""
    value = default if data.get(key) is None else data[key]
    if not isinstance(value, bool):
        raise SchemaError(f"{key} must be true or false; got {value!r:.40}")
    return value


def same(one: object, two: object) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not."""
    return isinstance(one, bool) == isinstance(two, bool) and one == two


# ------------------------------------------------------------------ simple rules

_REQUIRED: Final = object()


def fixed(**fields: Any) -> Rule:
    """What the family decides and no key says."""
    return Rule((), lambda data, found: dict(fields), lambda config: {})


def field(key: str, name: str, default: Any = _REQUIRED) -> Rule:
    """A key that is a field by another name; null or absent means `default`."""

    def read(data: Values, found: Fields) -> Fields:
        if default is _REQUIRED:
            return {name: required(data, key)}
        return {name: default if data.get(key) is None else data[key]}

    return Rule((key,), read, lambda config: {key: getattr(config, name)})


def nullable(key: str, name: str, default: Any = None) -> Rule:
    """The same where null says that there is none; absent means `default`."""
    return Rule(
        (key,),
        lambda data, found: {name: data.get(key, default)},
        lambda config: {key: getattr(config, name)},
    )


def choice(key: str, name: str, meanings: Mapping[Any, Any], default: Any = _REQUIRED) -> Rule:
    """A key with few known values, (value, what the field is then); the first is preferred."""

    def read(data: Values, found: Fields) -> Fields:
        value = default if data.get(key) is None else data[key]
        if value is _REQUIRED:
            required(data, key)
        for known, meaning in meanings.items():
            if same(known, value):
                return {name: meaning}
        raise _unknown(key, value, list(meanings))

    def write(config: ModelConfig) -> Fields:
        values = [v for v, meaning in meanings.items() if meaning == getattr(config, name)]
        return {key: default if default in values else values[0]} if values else {}

    return Rule((key,), read, write)


def only(key: str, *values: Any) -> Rule:
    """A key that changes the mathematics, and the values that do not."""

    def read(data: Values, found: Fields) -> Fields:
        if key in data and not any(same(data[key], value) for value in values):
            raise _unknown(key, data[key], [value for value in values if value is not None])
        return {}

    return Rule((key,), read, lambda config: {})


def not_built(key: str, what: str) -> Rule:
    """A switch of something that a family has and refcurv does not."""

    def read(data: Values, found: Fields) -> Fields:
        if flag(data, key, False):
            raise ConventionError(f"{key} is true: {what} is not built yet")
        return {}

    return Rule((key,), read, lambda config: {})


def echo(key: str, of: str, default: Any = None) -> Rule:
    """A key that no forward reads, an older spelling of `of`: null, or the same value."""

    def read(data: Values, found: Fields) -> Fields:
        value, meant = data.get(key), data.get(of, default)
        if value is not None and not same(value, meant):
            raise ConventionError(
                f"{key} is {value!r:.40} and {of} is {meant!r:.40}; which one is meant?"
            )
        return {}

    return Rule((key,), read, lambda config: {})


def bias(key: str, default: bool, *layers: str) -> Rule:
    """Do these linear layers have a bias?"""
    return Rule(
        (key,),
        lambda data, found: {"biases": layers if flag(data, key, default) else ()},
        lambda config: {key: layers[0] in config.biases},
    )


def _unknown(key: str, value: object, known: list[Any]) -> ConventionError:
    values = " or ".join(repr(v) for v in known) if known else "a model without it"
    return ConventionError(f"{key} is {value!r:.80}; refcurv computes only {values}")


ACTIVATIONS: Final = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
"""transformers' names. `gelu_fast` writes √(2/π) with ten digits, 4e-12 off."""


def activation(key: str, default: str) -> Rule:
    """The MLP's function."""
    return choice(key, "activation", ACTIVATIONS, default)


def sizes(
    width: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    mlp_width: str = "intermediate_size",
    kv_heads: str | None = "num_key_value_heads",
    head_width: str | None = "head_dim",
    derived: tuple[str, ...] = ("kv_heads", "head_width"),
) -> Rule:
    """The sizes by their keys; those in `derived` follow from others where a key is absent."""
    named = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "mlp_width": mlp_width,
    }

    def read(data: Values, found: Fields) -> Fields:
        D, n_heads = natural(data, width), natural(data, heads)
        sizes: Fields = {"width": D, "heads": n_heads}
        for name, key in named.items():
            if key is not None and (data.get(key) is not None or name not in derived):
                sizes[name] = natural(data, key, _MOST_LAYERS if name == "layers" else _MOST)
        sizes.setdefault("kv_heads", n_heads)
        sizes.setdefault("mlp_width", 4 * D)
        if "head_width" not in sizes and D % n_heads:
            raise SchemaError(f"{width} {D} is no multiple of {heads} {n_heads}")
        return {"head_width": D // n_heads} | sizes

    return Rule(
        tuple(key for key in named.values() if key is not None),
        read,
        lambda config: {key: getattr(config, name) for name, key in named.items() if key},
    )


# ------------------------------------------------------------------ rotary positions

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
"""The keys of each kind of scaling; those of every kind come beside them."""

NOT_BUILT: Final = ("axial", "dynamic", "longrope", "mrope", "proportional", "su", "yarn")
"""Kinds of rotary positions that published models have, where a family does not compute them."""

_BLOCKS: Final = ("rope_parameters", "rope_scaling")
_NESTED: Final = ("full_attention", "sliding_attention")


def rope(
    theta_key: str = "rope_theta",
    theta: float = 10_000.0,
    partial_key: str | None = None,
    partial: float = 1.0,
    scalings: tuple[Scaling, ...] = tuple(Scaling),
    nested: bool = False,
) -> Rule:
    """Rotary positions, in transformers 5's keys or the older ones.

    Args:
        theta_key: The older key of the base.
        theta: The base where no key says one.
        partial_key: The older key of the share of a head's width that turns; None for all of it.
        partial: The share where no key says one.
        scalings: Those that transformers computes for the family.
        nested: rope_parameters has a block for each kind of attention, and rope_scaling is of
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
    """All of them as one; null says nothing, and what is said twice must agree."""
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
    """Say of a kind that is known and not built that it is that; later releases write it twice."""
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
    """What one merged block says."""
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


# ------------------------------------------------------------------ windows

_FULL, _SLIDING = _NESTED


def one_window(default: int | None) -> Rule:
    """sliding_window of every block; null for none."""
    key = "sliding_window"

    def read(data: Values, found: Fields) -> Fields:
        if data.get(key, default) is None:
            return {}
        return {"windows": (natural({key: default, **data}, key),) * found["layers"]}

    def write(config: ModelConfig) -> Fields:
        return {key: config.windows[0] if config.windows else None}

    return Rule((key,), read, write)


def windows_by_layer(
    pattern: Callable[[int, Values], str], switch: str | None = None, more: tuple[str, ...] = ()
) -> Rule:
    """layer_types says which blocks have the sliding_window.

    Args:
        pattern: (block, config.json) → its type where layer_types is absent.
        switch: A key that turns windows on; off where it is absent.
        more: The keys that `pattern` reads.
    """
    keys = ("sliding_window", "layer_types")

    def read(data: Values, found: Fields) -> Fields:
        on = switch is None or flag(data, switch, False)
        types = data.get("layer_types")
        if types is None:
            if not on:
                return {}
            types = [pattern(i, data) for i in range(found["layers"])]
        if not isinstance(types, list) or len(types) != found["layers"]:
            raise SchemaError(
                f"layer_types must name the type of each of {found['layers']} blocks; got "
                f"{types!r:.60}"
            )
        for kind in types:
            if kind not in (_FULL, _SLIDING):
                raise ConventionError(
                    f"layer_types has {kind!r:.40}; refcurv computes only {_FULL!r} and "
                    f"{_SLIDING!r}"
                )
        if _SLIDING not in types:
            return {}
        if not on:
            raise ConventionError(f"layer_types has {_SLIDING!r}, but {switch} is not true")
        window = natural({"sliding_window": 4096, **data}, "sliding_window")
        return {"windows": tuple(window if kind == _SLIDING else 0 for kind in types)}

    def write(config: ModelConfig) -> Fields:
        windows = config.windows or (0,) * config.layers
        types = [_SLIDING if window else _FULL for window in windows]
        on = {} if switch is None else {switch: any(windows)}
        return {"layer_types": types, "sliding_window": max(windows) or 4096, **on}

    return Rule((*keys, *more) if switch is None else (*keys, switch, *more), read, write)


def upper_blocks(i: int, data: Values) -> str:
    """Qwen: the blocks from max_window_layers on have the window."""
    return (
        _SLIDING if i >= natural({"max_window_layers": 28, **data}, "max_window_layers") else _FULL
    )


def local_blocks() -> Rule:
    """GPT-Neo: attention_types, [[["global", "local"], times], ...], and window_size."""

    def read(data: Values, found: Fields) -> Fields:
        types = data.get("attention_types")
        plain: list[Any] = []
        groups = types if isinstance(types, list) else []
        good = bool(groups)
        for group in groups:
            good = good and isinstance(group, list) and len(group) == 2
            good = good and isinstance(group[0], list) and type(group[1]) is int
            if good and len(plain) <= found["layers"]:
                plain += group[0] * min(max(group[1], 0), found["layers"] + 1)
        if not good or len(plain) != found["layers"]:
            raise SchemaError(
                f"attention_types must name the type of each of {found['layers']} blocks, as in "
                f'[[["global", "local"], 6]]; got {types!r:.60}'
            )
        if data.get("attention_layers") not in (None, plain):
            raise ConventionError("attention_layers and attention_types differ")
        if any(kind not in ("global", "local") for kind in plain):
            raise ConventionError("attention_types has other than 'global' and 'local'")
        if "local" not in plain:
            return {}
        window = natural({"window_size": 256, **data}, "window_size")
        return {"windows": tuple(window if kind == "local" else 0 for kind in plain)}

    def write(config: ModelConfig) -> Fields:
        windows = config.windows or (0,) * config.layers
        types = ["local" if window else "global" for window in windows]
        return {"attention_types": [[types, 1]], "window_size": max(windows) or 256}

    return Rule(("attention_types", "attention_layers", "window_size"), read, write)


# ------------------------------------------------------------------ derived fields


def scaled_embedding() -> Rule:
    """Gemma: the embedding times the root of its width."""
    return Rule((), lambda data, found: {"embed_scale": found["width"] ** 0.5}, lambda config: {})


def query_scalar(key: str, default: int) -> Rule:
    """Gemma-2: scores times query_pre_attn_scalar^(-1/2)."""

    def read(data: Values, found: Fields) -> Fields:
        scalar = number({key: default, **data}, key)
        return {"score_scale": None if scalar == found["head_width"] else scalar**-0.5}

    def write(config: ModelConfig) -> Fields:
        if config.score_scale is None:
            return {key: config.head_width}
        scalar = config.score_scale**-2
        whole = round(scalar)
        return {key: whole if whole > 0 and whole**-0.5 == config.score_scale else scalar}

    return Rule((key,), read, write)


def images(specials: tuple[str, ...]) -> Rule:
    """A vision transformer's image, its positions and its classes."""

    def read(data: Values, found: Fields) -> Fields:
        height, width = _sides(data, "image_size")
        patch, other = _sides(data, "patch_size")
        if patch != other:
            raise ConventionError(f"patch_size is {patch} by {other}; refcurv cuts squares")
        image = Image(
            channels=natural({"num_channels": 3, **data}, "num_channels"),
            height=height,
            width=width,
            patch=patch,
            specials=specials,
        )
        return {
            "image": image,
            "learned_positions": image.positions,
            "vocabulary": _classes(data),
        }

    def write(config: ModelConfig) -> Fields:
        image = config.image
        if image is None:
            return {}
        sides = [image.height, image.width]
        return {
            "image_size": image.height if image.height == image.width else sides,
            "patch_size": image.patch,
            "num_channels": image.channels,
            "num_labels": config.vocabulary,
        }

    keys = ("image_size", "patch_size", "num_channels", "id2label", "num_labels")
    return Rule(keys, read, write)


def _sides(data: Values, key: str) -> tuple[int, int]:
    value = required(data, key)
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise SchemaError(f"{key} must be one length or two; got {value!r:.40}")
    return natural({key: sides[0]}, key), natural({key: sides[1]}, key)


def _classes(data: Values) -> int:
    """The number of labels; transformers' default is two."""
    labels = data.get("id2label")
    if labels is None:
        return natural({"num_labels": 2, **data}, "num_labels")
    if not isinstance(labels, dict) or not labels:
        raise SchemaError(f"id2label must be an object that names the classes; got {labels!r:.40}")
    if data.get("num_labels") not in (None, len(labels)):
        raise ConventionError(
            f"num_labels is {data['num_labels']!r:.40}, but id2label names {len(labels)} classes"
        )
    return len(labels)
