"""Keys of a config.json ↔ fields of a ModelConfig: the rules that a family is written in.

A rule knows its keys and works in both directions. A rule never guesses: a value that it does not
know is an error. The error is a sentence about the key; the caller puts the file's name in front.
An absent or null key has transformers' own default, if that default is harmless.

Rotary positions are in `rotary_keys`, windows in `window_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of
from refcurv.model.config import LARGEST, Activation, Image, ModelConfig

Values = Mapping[str, Any]
Fields = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names for attention without and with a window."""

_MOST: Final = 2**31 - 1
_MOST_LAYERS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Some keys and what they mean.

    Fields:
        keys: the keys of config.json that the rule reads.
        read: (config.json, the fields that earlier rules found) → more fields of ModelConfig.
        write: ModelConfig → keys and values for config.json. The keys cannot describe every
            ModelConfig. `write` then gives other values or none, and the exporter notices: it reads
            its own text back and compares.
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


def natural(data: Values, key: str, most: int = _MOST, least: int = 1) -> int:
    """An integer, positive unless `least` is 0. The JSON values true and 1.0 are refused."""
    value = required(data, key)
    if type(value) is not int or not least <= value <= most:
        kind = "a positive integer" if least else "0 or a positive integer"
        raise SchemaError(f"{key} must be {kind} up to {most}; got {value!r:.40}")
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
    """Are two JSON values equal? 1 equals 1.0; 1 does not equal true."""
    return isinstance(one, bool) == isinstance(two, bool) and one == two


# ------------------------------------------------------------------ simple rules

_REQUIRED: Final = object()


def fixed(**fields: Any) -> Rule:
    """Fields that have one value in the whole family, and no key."""
    return Rule((), lambda data, found: dict(fields), lambda config: {})


def field(key: str, name: str, default: Any = _REQUIRED) -> Rule:
    """The value of a key becomes the field `name`; a key that is null or absent means `default`."""

    def read(data: Values, found: Fields) -> Fields:
        if default is _REQUIRED:
            return {name: required(data, key)}
        return {name: default if data.get(key) is None else data[key]}

    return Rule((key,), read, lambda config: {key: getattr(config, name)})


def nullable(key: str, name: str, default: Any = None) -> Rule:
    """As `field`, but null is a value of its own: there is none. An absent key means `default`."""
    return Rule(
        (key,),
        lambda data, found: {name: data.get(key, default)},
        lambda config: {key: getattr(config, name)},
    )


def choice(key: str, name: str, meanings: Mapping[Any, Any], default: Any = _REQUIRED) -> Rule:
    """A key with few known values: {value of the key: value of the field}; any other is refused.

    `write` takes the default where it fits, else the first value that does.
    """

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
    """A key that could change the mathematics: these values do not, and any other is refused."""

    def read(data: Values, found: Fields) -> Fields:
        if key in data and not any(same(data[key], value) for value in values):
            raise _unknown(key, data[key], [value for value in values if value is not None])
        return {}

    return Rule((key,), read, lambda config: {})


def not_built(key: str, what: str) -> Rule:
    """A key that switches on what refcurv does not compute: true is refused."""

    def read(data: Values, found: Fields) -> Fields:
        if flag(data, key, False):
            raise ConventionError(f"{key} is true: {what} is not built yet")
        return {}

    return Rule((key,), read, lambda config: {})


def echo(key: str, of: str, default: Any = None) -> Rule:
    """A key that transformers no longer reads, the older name of `of`.

    It may be null, or have the same value as `of`.
    """

    def read(data: Values, found: Fields) -> Fields:
        value, meant = data.get(key), data.get(of, default)
        if value is not None and not same(value, meant):
            raise ConventionError(
                f"{key} is {value!r:.40} and {of} is {meant!r:.40}; which one is meant?"
            )
        return {}

    return Rule((key,), read, lambda config: {})


def bias(key: str, default: bool, *layers: str) -> Rule:
    """A key that says whether these linear layers have a bias."""
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
"""transformers' names → ours. `gelu_fast` has √(2/π) to ten digits, an error of 4e-12."""


def activation(key: str, default: str) -> Rule:
    """The key that names the activation function of the MLP."""
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
    """The sizes, each by its key.

    A size in `derived` may lack its key; it then follows from the others: kv_heads = heads,
    mlp_width = 4 width, head_width = width / heads. Without a key name (None) it always does.
    """
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


# ------------------------------------------------------------------ derived fields


def scaled_embedding() -> Rule:
    """Gemma multiplies the embedding by the square root of the width."""
    return Rule((), lambda data, found: {"embed_scale": found["width"] ** 0.5}, lambda config: {})


def query_scalar(key: str, default: int) -> Rule:
    """Gemma-2 multiplies the scores by query_pre_attn_scalar^(-1/2)."""

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
    """The number of classes: as many as id2label names, or num_labels, by default two."""
    labels = data.get("id2label")
    if labels is None:
        return natural({"num_labels": 2, **data}, "num_labels")
    if not isinstance(labels, dict) or not labels:
        raise SchemaError(f"id2label must be an object that names the classes; got {labels!r:.40}")
    if data.get("num_labels") not in (None, len(labels)):
        raise ConventionError(
            f"num_labels is {data['num_labels']!r:.40}, but id2label names "
            f"{number_of(len(labels), 'class', 'classes')}"
        )
    return len(labels)
