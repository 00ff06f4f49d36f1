"""One ModelConfig for every architecture, and the names and shapes of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from refcurv.law.checks import ConventionError, RangeError, require_choice

LARGEST = float(np.finfo(np.float64).max)
SMALLEST = float(np.finfo(np.float64).tiny)


class Norm(StrEnum):
    """RMSNorm, or LayerNorm, which is RMSNorm of x − mean(x)."""

    RMS = "rms"
    LAYER = "layer"


class NormPlace(StrEnum):
    """Where a block normalises: before attention and MLP, after them (OLMo-2), or both (Gemma)."""

    PRE = "pre"
    POST = "post"
    BOTH = "both"


class QKNorm(StrEnum):
    """Norm of queries and keys: none, over each head's width, or over all heads at once."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Residual(StrEnum):
    """What the MLP of a block with input x reads.

    sequential: norm(x + attention). parallel: norm(x), its own. shared: the norm(x) of attention.
    """

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    SHARED = "shared"


class Activation(StrEnum):
    """The MLP's function; `gelu` has the exact erf, `gelu_tanh` its approximation by tanh."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Pool(StrEnum):
    """What the head reads: every position, the first (CLS), or the mean of all."""

    NONE = "none"
    CLS = "cls"
    MEAN = "mean"


class Scaling(StrEnum):
    """How rotary frequencies are stretched to a longer context."""

    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    DYNAMIC = "dynamic"
    LONGROPE = "longrope"


LINEAR = ("patch", "q", "k", "v", "o", "gate", "up", "down", "head")
"""The kinds of linear layers, by the last part of their names."""

SPECIALS = ("cls", "distillation")
"""The vectors that stand before an image's patches."""

ROTARY = ("main", "local", "none")
"""The rotary positions that a block can have (`ModelConfig.rope`)."""

TABLES = ("embed", "position")
"""The tables of vectors; a position reads one entry of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies f are stretched for a context longer than the trained one.

    Fields:
        kind: which rule (see `layers.rope_frequencies`).
        factor: a stretched frequency is f / factor (longrope has short and long in its place).
        original: positions of the trained context. A frequency f makes original·f/2π turns in it.
        slow, fast: a frequency is stretched if it makes fewer turns than `slow`; it stays if it
            makes more than `fast`; between them it is in part stretched.
        attention: cos and sin are multiplied by it (yarn, longrope).
        truncate: yarn's ramp starts and ends at whole dimensions.
        short, long: longrope's divisors, in a text of up to `original` positions, and a longer one.
    """

    kind: Scaling
    factor: float = 1.0
    original: int = 0
    slow: float = 1.0
    fast: float = 1.0
    attention: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse fields that make no rule."""
        who = "RopeScaling"
        kind = Scaling(require_choice(who, "kind", self.kind, Scaling))
        object.__setattr__(self, "kind", kind)
        for name in ("factor", "slow", "fast", "attention"):
            _require_number(self, who, name, SMALLEST)
        _require_bools(self, who, ("truncate",))
        _require_divisors(self, who)
        if kind is not Scaling.LINEAR:
            _require_naturals(self, who, ("original",), 1)
        if kind in (Scaling.LLAMA3, Scaling.YARN) and not self.slow < self.fast:
            turns = f"{self.slow:g} and {self.fast:g} turns"
            raise ConventionError(f"{who}: slow must lie below fast; got {turns}.")


Rope = tuple[float, RopeScaling | None]
"""Rotary positions: their base and scaling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a vision transformer reads: images cut into square patches, row by row.

    Fields: channels, height, width; patch, its side in pixels; specials, the vectors that stand
    before the patches: (), ("cls",) or ("cls", "distillation").
    """

    channels: int
    height: int
    width: int
    patch: int
    specials: tuple[str, ...] = ("cls",)

    def __post_init__(self) -> None:
        """Refuse an image that cannot be cut into patches."""
        who = "Image"
        _require_naturals(self, who, ("channels", "height", "width", "patch"), 1)
        if self.height % self.patch or self.width % self.patch:
            raise ConventionError(
                f"{who}: height and width must be multiples of patch; got {self.height}, "
                f"{self.width} and {self.patch}."
            )
        _require_names(self, who, "specials", SPECIALS)
        if self.specials != SPECIALS[: len(self.specials)]:
            raise ConventionError(f"{who}: specials must begin with 'cls'; got {self.specials}.")

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def positions(self) -> int:
        """How many positions the blocks see: specials, then patches."""
        return len(self.specials) + self.patches

    @property
    def patch_size(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.patch * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a transformer. What differs between architectures is data.

    Fields, sizes first:
        vocabulary: outputs of the head: tokens, or an image classifier's classes.
        width, layers, heads, kv_heads, head_width, mlp_width.
        norm_place, qk_norm, norm_eps; norm; norm_gain: do norms have a gain; norm_offset: does the
            file hold gain − 1; norm_bias: do norms have a bias.
        rope_theta: base of rotary positions, or None; rope_width: how many of a head's first
            entries turn, None for all; rope_scaling.
        rotary: for each block its rotary positions: "main", of rope_theta and rope_scaling;
            "local", of the base local_theta, without scaling; or "none". () means main in each.
        learned_positions: rows of the table of learned positions, or 0; position_offset: rows
            before these that no position reads (OPT).
        tied: is the head's weight the embedding.
        biases: the kinds of linear layers (LINEAR) that have a bias.
        gated: h = f(gate) · up, else h = f(up); activation: f.
        residual: what the MLP reads.
        score_scale: q·k is multiplied by it, None for head_width^(-1/2).
        score_cap, logit_cap: scores or logits become c · tanh(x/c); None leaves them.
        qkv_clip: q, k and v are clipped to ±qkv_clip; None leaves them.
        windows: for each block, how many last positions a query sees, 0 for all; () all in each.
        embed_scale: the token embedding is multiplied by it.
        causal: does a position see only itself and earlier ones.
        image: what a vision transformer reads, None for tokens; pool: what its head reads.

    Every field is checked on construction; a contradiction is a ConventionError or RangeError.
    Proof: tests/test_transformer.py::test_gradient_of_every_parameter_equals_complex_step
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_place: NormPlace
    qk_norm: QKNorm
    norm_eps: float
    rope_theta: float | None
    tied: bool
    norm: Norm = Norm.RMS
    norm_gain: bool = True
    norm_offset: bool = False
    norm_bias: bool = False
    rope_width: int | None = None
    rope_scaling: RopeScaling | None = None
    local_theta: float | None = None
    rotary: tuple[str, ...] = ()
    learned_positions: int = 0
    position_offset: int = 0
    biases: tuple[str, ...] = ()
    gated: bool = True
    activation: Activation = Activation.SILU
    residual: Residual = Residual.SEQUENTIAL
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    qkv_clip: float | None = None
    windows: tuple[int, ...] = ()
    embed_scale: float = 1.0
    causal: bool = True
    image: Image | None = None
    pool: Pool = Pool.NONE

    def __post_init__(self) -> None:
        """Refuse fields that contradict each other."""
        who = "ModelConfig"
        _require_naturals(self, who, _SIZES, 1)
        _require_naturals(self, who, ("learned_positions", "position_offset"), 0)
        for name, kind in _ENUMS.items():
            value = require_choice(who, name, getattr(self, name), kind)
            object.__setattr__(self, name, kind(value))
        _require_bools(self, who, _BOOLS)
        _require_number(self, who, "norm_eps", 0.0)
        for name in ("rope_theta", "local_theta", *_SCALES):
            if getattr(self, name) is not None:
                _require_number(self, who, name, SMALLEST if name in _SCALES else 1.0)
        _require_number(self, who, "embed_scale", SMALLEST)
        _require_names(self, who, "biases", LINEAR)
        _require_blocks(self, who)
        _require_heads(self, who)
        _require_input(self, who)

    # -------------------------------------------------------------- parameters

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in file order."""
        D = self.width
        shapes: dict[str, tuple[int, ...]] = {}
        if self.image is None:
            shapes["embed.weight"] = (self.vocabulary, D)
        else:
            shapes |= self._linear("patch", D, self.image.patch_size)
            shapes |= {f"{name}.weight": (D,) for name in self.image.specials}
        if self.learned_positions:
            shapes["position.weight"] = (self.position_offset + self.learned_positions, D)
        for i in range(self.layers):
            shapes |= self._block_shapes(f"blocks.{i}.")
        shapes |= self._norm("final_norm", D)
        head = self._linear("head", self.vocabulary, D)
        if self.tied:
            del head["head.weight"]
        return shapes | head

    def _block_shapes(self, at: str) -> dict[str, tuple[int, ...]]:
        D, M, E = self.width, self.mlp_width, self.head_width
        Q, KV = self.heads * E, self.kv_heads * E
        both = self.norm_place is NormPlace.BOTH
        shapes = self._norm(f"{at}attn_norm", D)
        for name, size in (("q", Q), ("k", KV), ("v", KV)):
            shapes |= self._linear(f"{at}attn.{name}", size, D)
        if self.qk_norm is not QKNorm.NONE:
            full = self.qk_norm is QKNorm.FULL
            shapes |= self._norm(f"{at}attn.q_norm", Q if full else E)
            shapes |= self._norm(f"{at}attn.k_norm", KV if full else E)
        shapes |= self._linear(f"{at}attn.o", D, Q)
        if both:
            shapes |= self._norm(f"{at}attn_post_norm", D)
        if self.residual is not Residual.SHARED:
            shapes |= self._norm(f"{at}mlp_norm", D)
        for name in ("gate", "up") if self.gated else ("up",):
            shapes |= self._linear(f"{at}mlp.{name}", M, D)
        shapes |= self._linear(f"{at}mlp.down", D, M)
        return shapes | (self._norm(f"{at}mlp_post_norm", D) if both else {})

    def _linear(self, layer: str, d_out: int, d_in: int) -> dict[str, tuple[int, ...]]:
        bias = {f"{layer}.bias": (d_out,)} if self.has_bias(layer) else {}
        return {f"{layer}.weight": (d_out, d_in), **bias}

    def _norm(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        parts = {"weight": self.norm_gain, "bias": self.norm_bias}
        return {f"{name}.{part}": (size,) for part, there in parts.items() if there}

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Every linear layer's name and (d_out, d_in), in file order; the head is the last."""
        layers = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.parameter_shapes().items()
            if len(shape) == 2 and name not in ("embed.weight", "position.weight")
        }
        layers["head"] = (self.vocabulary, self.width)
        return layers

    def tables(self) -> dict[str, tuple[int, int]]:
        """EMBEDDING: the tables, as linear layers of one-hot inputs: name → (D, entries)."""
        shapes = self.parameter_shapes()
        found = {name: shapes.get(f"{name}.weight") for name in TABLES}
        return {name: (shape[1], shape[0]) for name, shape in found.items() if shape}

    def has_bias(self, layer: str) -> bool:
        """Does linear layer `layer` have a bias?"""
        return layer.rpartition(".")[2] in self.biases

    def window(self, i: int) -> int:
        """How many last positions a query of block i sees; 0 for all."""
        return self.windows[i] if self.windows else 0

    def rope(self, i: int) -> Rope | None:
        """The rotary positions of block i; None where it has none."""
        kind = self.rotary[i] if self.rotary else "main"
        theta = {"main": self.rope_theta, "local": self.local_theta, "none": None}[kind]
        return None if theta is None else (theta, self.rope_scaling if kind == "main" else None)

    def weight_of(self, layer: str) -> str:
        """The parameter that linear layer `layer` multiplies by: the embedding for a tied head."""
        return "embed.weight" if layer == "head" and self.tied else f"{layer}.weight"

    def input_of(self, layer: str) -> str:
        """The name of the input that `layer` reads: q, k and v share one, gate and up another."""
        block, _, name = layer.rpartition(".")
        if name in ("q", "k", "v"):
            return f"{block}.qkv"
        return f"{block}.gate_up" if name in ("gate", "up") else layer


# ------------------------------------------------------------------ what fields must be

_SIZES = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
_BOOLS = ("tied", "norm_gain", "norm_offset", "norm_bias", "gated", "causal")
_SCALES = ("score_scale", "score_cap", "logit_cap", "qkv_clip")
_ENUMS: dict[str, type[StrEnum]] = {
    "norm_place": NormPlace, "qk_norm": QKNorm, "norm": Norm,
    "activation": Activation, "residual": Residual, "pool": Pool,
}  # fmt: skip


def _require_naturals(record: object, who: str, names: Sequence[str], least: int) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            what = "a positive integer" if least else "an integer >= 0"
            raise RangeError(f"{who}: {name} must be {what}; got {value!r:.40}.")


def _require_bools(record: object, who: str, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(value := getattr(record, name), bool):
            raise ConventionError(f"{who}: {name} must be true or false; got {value!r:.40}.")


def _require_number(record: object, who: str, name: str, least: float) -> None:
    """A finite number >= least, kept as a float."""
    value = getattr(record, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RangeError(f"{who}: {name} must be a number; got {value!r:.40}.")
    if not least <= value <= LARGEST:
        bound = "positive" if least == SMALLEST else f">= {least:g}"
        raise RangeError(f"{who}: {name} must be finite and {bound}; got {value!r:.40}.")
    object.__setattr__(record, name, float(value))


def _require_names(record: object, who: str, field_name: str, known: Sequence[str]) -> None:
    """Refuse all but different known names; keep them as a tuple, in the order of `known`."""
    value = getattr(record, field_name)
    if not isinstance(value, tuple | list) or len(set(map(str, value))) != len(value):
        raise ConventionError(f"{who}: {field_name} must be different names; got {value!r:.80}.")
    for name in value:
        require_choice(who, field_name, name, known)
    object.__setattr__(record, field_name, tuple(name for name in known if name in value))


def _require_divisors(scaling: RopeScaling, who: str) -> None:
    short, long = scaling.short, scaling.long
    good = isinstance(short, tuple) and isinstance(long, tuple) and len(short) == len(long)
    good = good and bool(short) == (scaling.kind is Scaling.LONGROPE)
    if not good or not all(type(x) in (int, float) and 0 < x <= LARGEST for x in short + long):
        raise ConventionError(
            f"{who}: longrope, and no other kind, has short and long, as many finite, positive "
            f"numbers each; got {short!r:.40} and {long!r:.40}."
        )


def _require_heads(config: ModelConfig, who: str) -> None:
    if config.heads % config.kv_heads:
        raise ConventionError(
            f"{who}: heads must be a multiple of kv_heads; got {config.heads}, {config.kv_heads}."
        )
    if config.rope_theta is None:
        of = (config.rope_width, config.rope_scaling, config.local_theta, config.rotary or None)
        if any(value is not None for value in of):
            of_rope = "rope_width, rope_scaling, local_theta and rotary"
            raise ConventionError(f"{who}: {of_rope} need a rope_theta, and it is None.")
        return
    if config.rope_width is None:
        width = config.head_width
    else:
        _require_naturals(config, who, ("rope_width",), 1)
        width = config.rope_width
    if width % 2 or width > config.head_width:
        raise ConventionError(
            f"{who}: rotary positions turn pairs: rope_width (by default head_width) must be even, "
            f"and rope_width at most head_width; got rope_width {config.rope_width}, head_width "
            f"{config.head_width}."
        )
    scaling = config.rope_scaling
    if scaling is not None and not isinstance(scaling, RopeScaling):
        raise ConventionError(f"{who}: rope_scaling is a RopeScaling or None; got {scaling!r:.80}.")
    if scaling is not None and scaling.kind is Scaling.YARN and config.rope_theta == 1:
        raise ConventionError(
            f"{who}: yarn orders frequencies, and with rope_theta 1 all are one. Give a larger one."
        )
    if scaling is not None and len(scaling.short) not in (0, width // 2):
        raise ConventionError(
            f"{who}: short and long must have {width // 2} numbers each, one for each pair that "
            f"turns; got {len(scaling.short)}."
        )


def _require_blocks(config: ModelConfig, who: str) -> None:
    """Of each block its window and rotary positions; () where none has other than the usual."""
    for name, usual, what in (("windows", 0, "integer >= 0"), ("rotary", "main", f"of {ROTARY}")):
        value = getattr(config, name)
        good = isinstance(value, tuple | list) and len(value) in (0, config.layers)
        if not good or not all(v in ROTARY if usual else type(v) is int and v >= 0 for v in value):
            raise RangeError(
                f"{who}: {name} must hold one {what} for each block ({config.layers}), or "
                f"nothing; got {value!r:.80}."
            )
        object.__setattr__(config, name, tuple(value) if any(v != usual for v in value) else ())
    if config.windows and not config.causal:
        raise ConventionError(f"{who}: windows need causal attention, but causal is False.")
    if "local" not in config.rotary:
        object.__setattr__(config, "local_theta", None)
    elif config.local_theta is None:
        raise ConventionError(f"{who}: rotary has 'local', which needs a local_theta; it is None.")


def _require_input(config: ModelConfig, who: str) -> None:
    """Refuse choices that do not go together: of inputs, norms and residuals."""
    if config.residual is Residual.SHARED and config.norm_place is not NormPlace.PRE:
        raise ConventionError(
            f"{who}: the norm that attention and MLP share stands before them: residual 'shared' "
            f"needs norm_place 'pre'; got {str(config.norm_place)!r}."
        )
    if config.norm_offset and not config.norm_gain:
        raise ConventionError(f"{who}: norm_offset needs a gain, but norm_gain is False.")
    if not config.gated and "gate" in config.biases:
        raise ConventionError(f"{who}: biases names 'gate', but gated is False: there is no gate.")
    image = config.image
    if image is None:
        if config.pool is not Pool.NONE or "patch" in config.biases:
            raise ConventionError(f"{who}: pool and a bias of 'patch' are for images; it has none.")
        return
    if not isinstance(image, Image):
        raise ConventionError(f"{who}: image must be an Image or None; got {image!r:.80}.")
    if config.causal or config.tied or config.embed_scale != 1 or config.pool is Pool.NONE:
        raise ConventionError(
            f"{who}: with an image, causal and tied must be False, embed_scale 1 and pool 'cls' or "
            f"'mean'; got {config.causal}, {config.tied}, {config.embed_scale:g} and "
            f"{str(config.pool)!r}."
        )
    if config.pool is Pool.CLS and not image.specials:
        raise ConventionError(f"{who}: pool is 'cls', but the image has no such position.")
    if config.learned_positions not in (0, image.positions):
        raise ConventionError(
            f"{who}: learned_positions must be {image.positions}, one for each special and patch, "
            f"or 0; got {config.learned_positions}."
        )
