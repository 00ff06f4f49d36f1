"""What another program's forward and backward may compute otherwise, one change each."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.files.lazy import Lazy
from refcurv.judge.diagnosis.variants.blocks import another_in_some, windows_of_some
from refcurv.judge.diagnosis.variants.dropout import PLACES, Dropout
from refcurv.judge.diagnosis.variants.heads import TILED, regrouped, rotate_interleaved
from refcurv.judge.diagnosis.variants.norms import (
    NO_EPS,
    outside_backward,
    outside_forward,
    unbiased_backward,
    unbiased_forward,
)
from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.judge.diagnosis.variants.rotary import (
    ROPES,
    coarse,
    coarse_ropes,
    of_factor,
    of_length,
    other_factors,
    other_lengths,
)
from refcurv.judge.diagnosis.variants.rounding import (
    CUT,
    TF32,
    Parts,
    all_in,
    attention_in,
    autocast_in,
    norms_in,
    products_in,
    rounded,
    to_bits,
)
from refcurv.judge.diagnosis.variants.shaken import WEIGHTS, shaken
from refcurv.judge.diagnosis.variants.sight import (
    EVERYWHERE,
    NOWHERE,
    Sight,
    sights,
    visible,
)
from refcurv.judge.diagnosis.variants.stopped import past_gate, past_statistics, past_weights
from refcurv.judge.diagnosis.variants.untrained import GROUPS, of_group, tied, untrained
from refcurv.law.checks import Array, RefcurvError
from refcurv.model.config import Activation, ModelConfig, Norm, QKNorm, Residual
from refcurv.model.layers import (
    DEFINITIONS,
    Layout,
    Ops,
    attention_backward,
    attention_forward,
    causal_layout,
    mlp_forward,
    rms_norm_forward,
)
from refcurv.model.transformer import Parameters, image_layout, layout_of
from refcurv.passes.fast import FAST

Level = tuple[str, float]
"""A change by its name in CHANGES, and how large it is; 0 where it has no size."""

SEEING: Final = ("real", "all")
"""What of a text padding may see. real: the real positions, as where keys alone are masked. all:
what it would see if it were real. Labels at padding then reach the text."""

PADS: Final = (*SEEING, "apart")
"""apart: padding sees padding alone, as where it stands on the left."""


@dataclass(frozen=True, slots=True)
class Network:
    """The arithmetic of a model, as another program may have it.

    Fields: config, parameters, ops; documents, do those of a packed sequence not see each other;
    restart, do positions restart with each; shift, added to learned positions; placed, do these
    count from the padding on the left, which is not attended; left, does the padding stand on the
    left and is attended; pads, what a position of padding sees: "blind", nothing, as in
    `model.layers`; or one of PADS; sharp, by what logits are multiplied before the softmax; bent,
    is the logits' soft-cap a part of the backward; drop, the dropout of one pass; sight, what hides
    positions, where `layout` alone cannot say it.
    """

    config: ModelConfig
    parameters: Parameters
    ops: Ops = DEFINITIONS
    documents: bool = True
    restart: bool = True
    shift: int = 0
    placed: bool = False
    left: bool = False
    pads: str = "blind"
    sharp: float = 1.0
    bent: bool = True
    drop: Dropout | None = None
    sight: Sight | None = None

    def layout(self, at: Positions) -> Layout:
        """Which positions see which, and where they stand."""
        if at.images:
            return image_layout(self.config, len(at.index_B))
        one = np.zeros_like(at.segment_BT)
        restart = self.restart if self.sight is None else self.sight.restart
        segment_BT = at.segment_BT if self.documents and restart else one
        none = not self.left and self.pads in ("blind", "real")
        seen_BT = at.real_BT if none else np.ones_like(at.real_BT)
        if self.pads == "apart" and not self.left:
            segment_BT = np.where(at.real_BT, segment_BT, -1)
        out = layout_of(self.config, seen_BT, segment_BT)
        if self.pads == "apart" and self.left:
            end_B1 = (~at.real_BT).sum(axis=1, keepdims=True) - 1
            out = replace(out, last_BT=np.where(at.real_BT, out.last_BT, end_B1))
        if self.pads == "real":
            out = _pads_see_text(out, at.real_BT)
        if at.seen_BT is not None or (restart and not self.documents):
            of_BT = at.segment_BT if restart else one
            out = replace(out, position_BT=causal_layout(seen_BT, of_BT).position_BT)
        if self.placed:
            out = replace(out, position_BT=np.argsort(at.order_BT, axis=1))
        if self.config.learned_positions:
            last = self.config.learned_positions - 1
            out = replace(out, position_BT=np.minimum(out.position_BT + self.shift, last))
        return out

    def layouts(self, at: Positions) -> list[Layout]:
        """Of each block. A window is part of it where it says what is seen itself."""
        config, out = self.config, self.layout(at)
        if not self.explicit(at):
            return [out] * config.layers
        one = self.sight or Sight(EVERYWHERE if config.causal else NOWHERE, self.documents)
        windows = [config.window(i) for i in range(config.layers)]
        seen = {w: visible(at, one, w, self.pads) for w in dict.fromkeys(windows)}
        return [replace(out, seen_BTS=seen[w]) for w in windows]

    def explicit(self, at: Positions) -> bool:
        """Is what a position sees no run of positions, so that each block must be told it?"""
        return not at.images and (self.sight is not None or at.seen_BT is not None)

    def ops_for(self, at: Positions) -> Ops:
        """The layer functions. The fast attention knows runs of positions alone."""
        if not self.explicit(at) or self.ops.attention_forward is not FAST.attention_forward:
            return self.ops
        return replace(
            self.ops, attention_forward=attention_forward, attention_backward=attention_backward
        )


def _pads_see_text(layout: Layout, real_BT: Array) -> Layout:
    """Padding sees the last document, and that alone."""
    end_B1 = real_BT.sum(axis=1, keepdims=True) - 1
    first_B1 = np.take_along_axis(layout.first_BT, np.maximum(end_B1, 0), axis=1)
    return Layout(
        layout.position_BT,
        np.where(real_BT, layout.first_BT, first_B1),
        np.where(real_BT, layout.last_BT, end_B1),
    )


# ------------------------------------------------------------------ the changes


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the arithmetic.

    Fields: fault; where, the levels at which it can occur with a model and a corpus, () for never;
    make, the changed Network; own, the level that the model itself has, of what can be fitted;
    reshaped, does it read parameters in another shape than the file has.
    """

    fault: str
    where: Callable[[ModelConfig, Positions], Sequence[float]]
    make: Callable[[Network, float], Network]
    own: Callable[[ModelConfig], float] | None = None
    reshaped: bool = False


def _if(test: Callable[[ModelConfig, Positions], Any]) -> Callable[..., Sequence[float]]:
    return lambda config, at: (0.0,) if test(config, at) else ()


def _is(**changes: Any) -> Callable[[Network, float], Network]:
    """Fields of the Network."""
    return lambda net, _level: replace(net, **changes)


def _config(net: Network, **changes: Any) -> Network:
    return replace(net, config=replace(net.config, **changes))


def _has(**changes: Any) -> Callable[[Network, float], Network]:
    """Fields of the configuration."""
    return lambda net, _level: _config(net, **changes)


def _in_all(kind: str) -> Callable[[Network, float], Network]:
    """Rotary positions of this kind in every block."""
    return lambda net, _level: _config(net, rotary=(kind,) * net.config.layers)


def _of_ops(**changes: Any) -> Callable[[Network, float], Network]:
    return lambda net, _level: replace(net, ops=replace(net.ops, **changes))


STORED: Final = ("bfloat16", "float16", CUT)
"""What weights may have gone through."""


def _stored(dtype: str) -> Callable[[Network, float], Network]:
    def make(net: Network, _level: float) -> Network:
        own = net.parameters
        return replace(net, parameters=Lazy(list(own), lambda name: rounded(own[name], dtype)))

    return make


def _to_bits(every: bool) -> Callable[[Network, float], Network]:
    """All parameters, or the blocks' matrices, that went through a float of so many digits."""

    def make(net: Network, bits: float) -> Network:
        own = net.parameters

        def read(name: str) -> Array:
            x = own[name]
            if not (every or (x.ndim == 2 and name.startswith("blocks."))):
                return x
            return to_bits(x, int(bits))

        return replace(net, parameters=Lazy(list(own), read))

    return make


def _to_integers(axis: int | None) -> Callable[[Network, float], Network]:
    """The blocks' matrices through integers of so many bits; a scale for each row, or for all."""

    def make(net: Network, bits: float) -> Network:
        own = net.parameters

        def read(name: str) -> Array:
            x = own[name]
            if x.ndim != 2 or not name.startswith("blocks."):
                return x
            scale = np.abs(x).max(axis=axis, keepdims=True) / (2.0 ** (bits - 1) - 1)
            return np.asarray(np.round(x / np.where(scale > 0, scale, 1)) * scale, x.dtype)

        return replace(net, parameters=Lazy(list(own), read))

    return make


PASSES: Final = 19
"""Random passes of a network with dropout.  Theirs is further from their mean than each of them
with odds of 1 in 20, if it is another such pass."""


def _dropping(place: str, number: int) -> Callable[[Network, float], Network]:
    def make(net: Network, p: float) -> Network:
        return replace(net, drop=Dropout(p, place, np.random.default_rng(number)))

    return make


def _shaken(some: str, number: int) -> Callable[[Network, float], Network]:
    return lambda net, share: replace(net, parameters=shaken(net.parameters, some, number, share))


def _never(_config: ModelConfig, _at: Positions) -> Sequence[float]:
    """Tried where an error has the size of a coarser dtype, or as what is fitted."""
    return ()


def _coarse(part: Callable[[str, Parts], Parts], dtype: str) -> Callable[[Network, float], Network]:
    def make(net: Network, _level: float) -> Network:
        config, parameters, ops = part(dtype, (net.config, net.parameters, net.ops))
        return replace(net, config=config, parameters=parameters, ops=ops)

    return make


def _packed(at: Positions) -> bool:
    inside = at.real_BT[:, 1:] & (at.segment_BT[:, 1:] != at.segment_BT[:, :-1])
    return bool(inside.any())


def _padded(at: Positions) -> bool:
    return not at.real_BT.all()


def _placed(config: ModelConfig) -> bool:
    """Has it positions, so that it is another where the padding stands on the other side?"""
    return config.rope_theta is not None or config.learned_positions > 0


def _lost(group: str) -> Change:
    """Parameters that a loader did not find."""
    return Change(
        "B57", _if(lambda config, _: of_group(group, config)),
        lambda net, _: replace(net, parameters=untrained(group, net.config, net.parameters)),
    )  # fmt: skip


def _bases(*values: float) -> Callable[[ModelConfig, Positions], Sequence[float]]:
    """Rotary bases; with two entries that turn the base has no effect, its frequency is 1."""

    def where(config: ModelConfig, _at: Positions) -> Sequence[float]:
        turns = config.rope_theta is not None and (config.rope_width or config.head_width) > 2
        return tuple(v for v in values if v != config.rope_theta) if turns else ()

    return where


def _eps(config: ModelConfig, _at: Positions) -> Sequence[float]:
    return tuple(eps for eps in (1e-3, 1e-5, 1e-6, 1e-8, 0.0) if eps != config.norm_eps)


def _wide(config: ModelConfig) -> bool:
    """Has no norm a single entry, of which nothing is left without the mean?"""
    return config.width > 1 and (config.qk_norm is QKNorm.NONE or config.head_width > 1)


def _score_scale(config: ModelConfig) -> float:
    return config.score_scale or config.head_width**-0.5


def _embed_scales(config: ModelConfig, _at: Positions) -> Sequence[float]:
    """Our scale twice; or, where there is none, the usual one."""
    other = config.embed_scale**2 if config.embed_scale != 1 else config.width**0.5
    return () if config.image is not None or other == config.embed_scale else (other,)


def _short_scale(config: ModelConfig) -> float:
    return float(rounded(np.array([config.embed_scale]), "bfloat16")[0])


def _by_heads(net: Network, kind: QKNorm) -> Network:
    """Queries and keys have norms of another kind. Gains of all heads go with their heads."""
    own, config = net.parameters, net.config

    def read(name: str) -> Array:
        w = own[name]
        if ".q_norm." not in name and ".k_norm." not in name:
            return w
        heads = config.heads if ".q_norm." in name else config.kv_heads
        return w.reshape(heads, -1) if kind is QKNorm.HEAD else np.tile(w, heads)

    return _config(replace(net, parameters=Lazy(list(own), read)), qk_norm=kind)


def _turned_off(field: str, off: Any, fault: str = "B54") -> Change:
    """A field that the other program does not know."""
    return Change(fault, _if(lambda config, _: getattr(config, field) != off), _has(**{field: off}))


def _activation(name: Activation) -> Change:
    return Change("B54", _if(lambda config, _: config.activation is not name),
                  _has(activation=name))  # fmt: skip


def _residual(name: Residual) -> Change:
    return Change("B54", _if(lambda config, _: config.residual is not name), _has(residual=name))


CHANGES: Final[Mapping[str, Change]] = MappingProxyType(
    {
        "no causal mask": Change(
            "B50", _if(lambda config, at: config.causal and at.real_BT.shape[1] > 1),
            _has(causal=False, windows=()),
        ),
        "documents see each other": Change(
            "B50", _if(lambda _, at: _packed(at)), _is(documents=False)
        ),
        "packed as one document": Change(
            "B50", _if(lambda _, at: _packed(at)), _is(documents=False, restart=False)
        ),
        "no windows": Change("B50", _if(lambda config, _: config.windows), _has(windows=())),
        "a window in all blocks": Change(
            "B50", windows_of_some,
            lambda net, w: _config(net, windows=(int(w),) * net.config.layers),
        ),
        **{one.name: Change("B50", _if(one.occurs), _is(sight=one)) for one in sights()},
        "padding attended": Change(
            "B50", _if(lambda config, at: not config.causal and _padded(at)), _is(pads="all")
        ),
        "padding attended on the left": Change(
            "B50", _if(lambda config, at: (config.causal or _placed(config)) and _padded(at)
                       and not _packed(at)), _is(left=True),
        ),
        "padding, which sees itself alone, attended on the left": Change(
            "B50", _if(lambda config, at: not config.causal and _padded(at) and not _packed(at)),
            _is(left=True, pads="apart"),
        ),
        "rotary pairs interleaved": Change(
            "B51", _if(lambda config, _: (config.rope_width or config.head_width) > 2
                       and config.rope_theta is not None), _of_ops(rotate=rotate_interleaved),
        ),
        "rotary base": Change(
            "B51", _bases(1e2, 1e3, 1e4, 1e5, 5e5, 1e6),
            lambda net, theta: _config(net, rope_theta=max(theta, 1.0)),
            own=lambda config: config.rope_theta or 1.0,
        ),
        "rotary base times": Change(
            "B51", _bases(0.1, 0.5, 2.0, 10.0),
            lambda net, by: _config(net, rope_theta=max(1.0, (net.config.rope_theta or 1) * by)),
        ),
        "no rotary scaling": Change(
            "B51", _if(lambda config, _: config.rope_scaling is not None), _has(rope_scaling=None)
        ),
        "rotary scaling by": Change("B51", other_factors, lambda net, by: _config(
            net, rope_scaling=of_factor(net.config.rope_scaling, by)
        )),
        "no rotary positions": Change(
            "B51", _if(lambda config, _: config.rope_theta is not None),
            _has(rope_theta=None, rope_width=None, rope_scaling=None, local_theta=None, rotary=()),
        ),
        **{name: Change("B51", coarse(*some), _of_ops(rope_tables=coarse_ropes(*some)))
           for name, some in ROPES.items()},
        "rotary positions of texts of length": Change(
            "B51", other_lengths,
            lambda net, n: replace(net, ops=replace(net.ops, rope_tables=of_length(n))),
        ),
        **{f"{kind} rotary positions in all blocks": Change(
            "B51", another_in_some(kind), _in_all(kind)
        ) for kind in ("main", "local")},
        "all of a head is rotary": Change(
            "B51", _if(lambda config, _: config.rope_width not in (None, config.head_width)
                       and config.head_width % 2 == 0
                       and not (config.rope_scaling and config.rope_scaling.short)),
            _has(rope_width=None),
        ),
        "positions shifted": Change(
            "B51", lambda config, at: tuple(
                float(n) for n in (1, 2) if not at.images
                and 0 < at.real_BT.shape[1] <= config.learned_positions - n
            ),
            lambda net, by: replace(net, shift=int(by)),
        ),
        "positions count padding on the left": Change(
            "B51", _if(lambda config, at: _padded(at)
                       and at.real_BT.shape[1] <= config.learned_positions), _is(placed=True),
        ),
        **{f"grouped {name} tiled": Change(
            "B52", _if(lambda config, _: 1 < config.kv_heads < config.heads),
            _of_ops(**regrouped(*sides)),
        ) for name, sides in TILED.items()},
        "attention weights detached": Change(
            "B48", _if(lambda _, at: at.images or at.real_BT.shape[1] > 1), _of_ops(
                attention_forward=attention_forward, attention_backward=past_weights
            ),
        ),
        "norm statistics detached": Change(
            "B48", _if(lambda config, _: config.width > 1), _of_ops(
                rms_norm_forward=rms_norm_forward, rms_norm_backward=past_statistics
            ),
        ),
        "gate detached": Change(
            "B48", _if(lambda config, _: config.gated),
            _of_ops(mlp_forward=mlp_forward, mlp_backward=past_gate),
        ),
        "eps outside the root": Change(
            "B53", _if(lambda config, _: config.norm_eps > 0),
            _of_ops(rms_norm_forward=outside_forward, rms_norm_backward=outside_backward),
        ),
        "variance over d − 1": Change(
            "B53", _if(lambda config, _: config.norm is Norm.LAYER and _wide(config)),
            _of_ops(rms_norm_forward=unbiased_forward, rms_norm_backward=unbiased_backward),
        ),
        "eps": Change(
            "B53", _eps, lambda net, eps: _config(net, norm_eps=max(eps, NO_EPS)),
            own=lambda config: config.norm_eps,
        ),
        "gain and gain − 1": Change(
            "B53", _if(lambda config, _: config.norm_gain),
            lambda net, _: _config(net, norm_offset=not net.config.norm_offset),
        ),
        "LayerNorm and RMSNorm": Change(
            "B53", _if(lambda config, _: config.width > 1),
            lambda net, _: _config(
                net, norm=Norm.RMS if net.config.norm is Norm.LAYER else Norm.LAYER
            ),
        ),
        **{f"activation {name}": _activation(name) for name in Activation},
        **{f"residual {name}": _residual(name) for name in Residual},
        "no score scale": Change(
            "B54", _if(lambda config, _: config.score_scale != 1 and config.head_width > 1),
            _has(score_scale=1.0),
        ),
        "score scale": Change(
            "B54", lambda config, _: tuple(_score_scale(config) * by for by in (0.5, 0.8, 1.25, 2)),
            lambda net, scale: _config(net, score_scale=scale), own=_score_scale,
        ),
        "QK-norm over each head": Change(
            "B54", _if(lambda config, _: config.qk_norm is QKNorm.FULL and config.norm_gain),
            lambda net, _: _by_heads(net, QKNorm.HEAD), reshaped=True,
        ),
        "QK-norm over all heads": Change(
            "B54", _if(lambda config, _: config.qk_norm is QKNorm.HEAD and config.norm_gain),
            lambda net, _: _by_heads(net, QKNorm.FULL), reshaped=True,
        ),
        "usual score scale": _turned_off("score_scale", None),
        "no QK-norm": _turned_off("qk_norm", QKNorm.NONE),
        "no soft-cap of scores": _turned_off("score_cap", None),
        "no soft-cap of logits": _turned_off("logit_cap", None, "B26"),
        "no soft-cap in the backward": Change(
            "B26", _if(lambda config, _: config.logit_cap is not None), _is(bent=False)
        ),
        "no clip of q, k and v": _turned_off("qkv_clip", None),
        "no embedding scale": _turned_off("embed_scale", 1.0),
        "embedding scale": Change(
            "B54", _embed_scales, lambda net, scale: _config(net, embed_scale=scale),
            own=lambda config: config.embed_scale,
        ),
        "logit scale": Change(
            "B26", lambda *_: (0.5, 0.8, 1.25, 2.0),
            lambda net, by: replace(net, sharp=net.sharp * by), own=lambda _: 1.0,
        ),
        "embedding scale in bfloat16": Change(
            "B54", _if(lambda config, _: _short_scale(config) != config.embed_scale),
            lambda net, _: _config(net, embed_scale=_short_scale(net.config)),
        ),
        **{group: _lost(group) for group in GROUPS},
        "head is the embedding": Change(
            "B57", _if(lambda config, _: not config.tied and config.image is None),
            lambda net, _: replace(net, parameters=tied(net.parameters)),
        ),
        **{f"weights as {dtype}": Change("B57", _if(lambda *_: True), _stored(dtype))
           for dtype in STORED},
        **{f"dropout on {place}, pass {n}": Change("B55", _never, _dropping(place, n))
           for place in PLACES for n in range(PASSES)},
        **{f"other weights of {some}, draw {n}": Change("B57", _never, _shaken(some, n))
           for some in WEIGHTS for n in range(PASSES)},
        "weights to bits": Change("B57", _never, _to_bits(True)),
        "matrices to bits": Change("B57", _never, _to_bits(False)),
        "integers by row": Change("B57", _never, _to_integers(1)),
        "integers by matrix": Change("B57", _never, _to_integers(None)),
        **{f"norms in {dtype}": Change("B53", _never, _coarse(norms_in, dtype))
           for dtype in ("bfloat16", "float16")},
        **{f"attention in {dtype}": Change("B56", _never, _coarse(attention_in, dtype))
           for dtype in ("bfloat16", "float16")},
        "autocast in bfloat16": Change("B59", _never, _coarse(autocast_in, "bfloat16")),
        "autocast in float16": Change("B60", _never, _coarse(autocast_in, "float16")),
        "all in bfloat16": Change("B59", _never, _coarse(all_in, "bfloat16")),
        "all in float16": Change("B60", _never, _coarse(all_in, "float16")),
        **{f"products in {dtype}": Change("B60", _never, _coarse(products_in, dtype))
           for dtype in TF32},
    }
)  # fmt: skip
"""The changes by name."""


def occurring(config: ModelConfig, at: Positions, started: Container[str] = GROUPS) -> list[Level]:
    """The changes, with their levels, that can occur with a model and a corpus.

    Args: started: the groups of parameters that are not at their start (`started_otherwise`).
    """
    found, own = [], config.parameter_shapes()
    for name, change in CHANGES.items():
        if name in GROUPS and name not in started:
            continue
        for level in change.where(config, at):
            try:
                asked = change.make(Network(config, {}), level).config.parameter_shapes()
            except RefcurvError:  # a configuration that cannot be
                continue
            if change.reshaped or asked.items() <= own.items():
                found.append((name, level))
    return found


PARTS: Final = tuple(
    f"{part} in {dtype}" for part in ("norms", "attention") for dtype in ("bfloat16", "float16")
)
"""Changes that round in one part alone."""

BITS: Final = (
    *((f"{some} to bits", float(bits)) for some in ("weights", "matrices") for bits in range(2, 8)),
    *((f"integers by {scale}", float(bits)) for scale in ("row", "matrix") for bits in (8, 4)),
)
"""Round trips through floats of fewer significant bits than bfloat16, as those of 8 and 4 bits, and
through integers of as many."""

PRODUCTS: Final = tuple(f"products in {dtype}" for dtype in TF32)
"""Changes that round what products read."""

AUTOCAST: Final = ("autocast in bfloat16", "autocast in float16")
"""Changes that round products, attention and the MLP, and neither norms nor the stream."""

COARSE: Final = (*PARTS, *PRODUCTS, *AUTOCAST, "all in bfloat16", "all in float16")
"""Changes that round on the way, in whatever order that may be: theirs is near, and not equal."""


def changed(
    config: ModelConfig,
    parameters: Parameters,
    changes: Iterable[Level],
    pads: str = "blind",
    fast: bool = True,
) -> Network:
    """The network of a model after some changes.

    Args: fast, by kernels, which know as many sequences in the backward as in the forward. By NumPy
    it is where arrays round on the way (`rounding.Coarse`), or parameters have another shape.
    """
    some = sorted(changes, key=lambda one: one[0] in COARSE)  # these wrap the others
    fast = fast and not any(name in COARSE or CHANGES[name].reshaped for name, _ in some)
    net = Network(config, parameters, FAST if fast else DEFINITIONS, pads=pads)
    for name, level in some:
        net = CHANGES[name].make(net, level)
    return net
