"""Parts of a network in a coarser arithmetic: what is computed in them is rounded on the way."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array
from refcurv.model.config import Activation, ModelConfig, Norm
from refcurv.model.layers import Layout, Ops, Saved
from refcurv.model.transformer import Parameters

Parts = tuple[ModelConfig, Parameters, Ops]
"""What of a network decides its arithmetic."""

TF32: Final = MappingProxyType({"tf32": np.rint, "tf32, cut": np.trunc})
"""How an operand of a product comes to 11 bits: programs round it, hardware cuts it."""


CUT: Final = "bfloat16, cut"
"""The first half of a float32, and not the bfloat16 that is nearest."""


def to_bits(x: Array, bits: int, whole: np.ufunc = np.rint) -> Array:
    """x with so many significant bits; `whole` says which of two neighbours an entry becomes."""
    part, exponent = np.frexp(x)
    return np.asarray(np.ldexp(whole(np.ldexp(part, bits)), exponent - bits))


def rounded(x: Array, dtype: str) -> Array:
    """x as `dtype` holds it, in its own dtype."""
    if dtype in TF32:
        return to_bits(x, 11, TF32[dtype])
    if dtype == CUT:
        return to_bits(x, 8, np.trunc)
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(x)).astype(x.dtype)
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(x.dtype)


# ------------------------------------------------------------------ an array that rounds


class Coarse(np.ndarray):
    """An array of bfloat16: what a function makes of it is rounded, the sums inside are not."""

    held = "bfloat16"

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **more: Any) -> Any:
        into = more.pop("out", None)
        found = getattr(ufunc, method)(*self.read(ufunc, inputs), **more)
        found = self.given(found, ufunc, inputs)
        if into is not None:
            np.copyto(into[0], found)
            return into[0]
        return found

    def read(self, _ufunc: np.ufunc, inputs: tuple[Any, ...]) -> list[Any]:
        """What a function reads of its inputs."""
        return [plain(x) for x in inputs]

    def given(self, found: Any, _ufunc: np.ufunc, _inputs: tuple[Any, ...]) -> Any:
        """What it gives."""
        if np.asarray(found).dtype.kind != "f":
            return found
        return rounded(np.asarray(found), self.held).view(type(self))


class Half(Coarse):
    """The same of float16."""

    held = "float16"


class Short(Coarse):
    """An array whose products read 11 bits of their operands; nothing else is rounded."""

    held = "tf32"

    def read(self, ufunc: np.ufunc, inputs: tuple[Any, ...]) -> list[Any]:
        """Operands of products are rounded."""
        given = super().read(ufunc, inputs)
        product = ufunc is np.matmul
        return [rounded(np.asarray(x), self.held) for x in given] if product else given

    def given(self, found: Any, _ufunc: np.ufunc, _inputs: tuple[Any, ...]) -> Any:
        """As it is."""
        return found.view(type(self)) if isinstance(found, np.ndarray) else found


class Cut(Short):
    """The same of operands that are cut."""

    held = "tf32, cut"


class Cast(Short):
    """An array of autocast: products read and give bfloat16, and so do functions of such alone."""

    held = "bfloat16"

    def given(self, found: Any, ufunc: np.ufunc, inputs: tuple[Any, ...]) -> Any:
        """In the wider of the dtypes of its inputs."""
        alone = all(isinstance(x, Cast) or np.ndim(x) == 0 for x in inputs)
        return Coarse.given(self, found, ufunc, inputs) if alone or ufunc is np.matmul else found


class CastHalf(Cast):
    """The same of float16."""

    held = "float16"


KINDS = {"bfloat16": Coarse, "float16": Half, "tf32": Short, "tf32, cut": Cut}


def plain(x: Any) -> Any:
    """x without rounding of what is computed with it."""
    return np.asarray(x) if isinstance(x, Coarse) else x


def _like(x: Array, dtype: str, through: bool) -> Array:
    """x, which `dtype` holds, as an array that rounds where all of a network does."""
    return x.view(KINDS[dtype]) if through else x


# ------------------------------------------------------------------ parts


def norms_in(dtype: str, parts: Parts, through: bool = False) -> Parts:
    """Norms that read and give `dtype`, and so do their backwards. Inside nothing is rounded.

    The bias is added before the output is rounded: it stands as a second row below the gain.
    """
    config, parameters, ops = parts
    own = replace(config, norm_bias=False, norm_offset=False) if config.norm_gain else config

    def read(name: str) -> Array:
        gain = parameters[name]
        if not name.endswith("norm.weight"):
            return gain
        gain = plain(gain) + float(config.norm_offset)
        bias = plain(parameters[name.replace("weight", "bias")]) if config.norm_bias else 0 * gain
        return np.stack([gain, bias])

    def forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
        x = plain(x) if config.norm is Norm.LAYER else rounded(plain(x), dtype)  # else by `centre`
        gain, bias = gain if config.norm_gain else (gain, 0.0)
        y, saved = ops.rms_norm_forward(x, gain, eps)
        return _like(rounded(y + bias, dtype), dtype, through), saved

    def backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
        d_x, d_gain = ops.rms_norm_backward(rounded(plain(d_y), dtype), saved)
        d_x = ops.centre(d_x) if config.norm is Norm.LAYER else d_x
        return _like(rounded(d_x, dtype), dtype, through), d_gain

    def centre(x: Array) -> Array:
        return _like(ops.centre(rounded(plain(x), dtype)), dtype, through)

    new = replace(ops, rms_norm_forward=forward, rms_norm_backward=backward, centre=centre)
    return own, Lazy(list(parameters), read), new


def attention_in(dtype: str, parts: Parts, through: bool = False) -> Parts:
    """Attention that reads and gives `dtype`, as its backward does; inside nothing is rounded."""
    config, parameters, ops = parts

    def short(*some: Array) -> tuple[Array, ...]:
        return tuple(_like(rounded(plain(x), dtype), dtype, through) for x in some)

    def forward(
        q: Array, k: Array, v: Array, layout: Layout, scale: float | None, cap: float | None
    ) -> tuple[Array, Saved]:
        q, k, v = (plain(x) for x in short(q, k, v))
        context, saved = ops.attention_forward(q, k, v, layout, scale, cap)
        return short(context)[0], saved

    def backward(d_context: Array, saved: Saved) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = short(*ops.attention_backward(plain(short(d_context)[0]), saved))
        return d_q, d_k, d_v

    return config, parameters, replace(ops, attention_forward=forward, attention_backward=backward)


def all_in(dtype: str, parts: Parts) -> Parts:
    """Every function of the network gives `dtype`; norms, attention and MLP round at their ends."""
    config, parameters, ops = attention_in(dtype, norms_in(dtype, parts, True), True)

    def forward(activation: Activation, gate: Array | None, up: Array) -> tuple[Array, Saved]:
        h, saved = ops.mlp_forward(activation, plain(gate), plain(up))
        return _like(rounded(h, dtype), dtype, True), saved

    def backward(d_h: Array, saved: Saved) -> tuple[Array | None, Array]:
        both = ops.mlp_backward(plain(d_h), saved)
        d_gate, d_up = (x if x is None else _like(rounded(x, dtype), dtype, True) for x in both)
        assert d_up is not None
        return d_gate, d_up

    def read(name: str) -> Array:
        own = parameters[name]
        return own if name.endswith("norm.weight") else rounded(own, dtype).view(KINDS[dtype])

    return (
        config,
        Lazy(list(parameters), read),
        replace(ops, mlp_forward=forward, mlp_backward=backward),
    )


def autocast_in(dtype: str, parts: Parts) -> Parts:
    """As autocast has it: products, attention and the MLP in `dtype`, norms and the stream not.

    A table that is read as it is stands beside the head's weight that is not.

    Proof: tests/test_judge_network.py::test_under_autocast_products_round_and_the_stream_does_not
    """
    kind = {"bfloat16": Cast, "float16": CastHalf}[dtype]
    config, parameters, ops = attention_in(dtype, parts)
    own = replace(config, tied=False)
    source = {own.weight_of(x): config.weight_of(x) for x in config.linear_layers()}

    def norm(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
        return ops.rms_norm_forward(plain(x), gain, eps)

    def norm_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
        return ops.rms_norm_backward(plain(d_y), saved)

    def forward(activation: Activation, gate: Array | None, up: Array) -> tuple[Array, Saved]:
        h, saved = ops.mlp_forward(activation, None, plain(up if gate is None else gate))
        h, up = rounded(h, dtype), plain(up)
        return (h, (saved,)) if gate is None else (rounded(h * up, dtype), (saved, h, up))

    def backward(d_h: Array, saved: Saved) -> tuple[Array | None, Array]:
        d_h = rounded(plain(d_h), dtype)
        activated, *gated = saved
        d_up = None
        if gated:
            h, up = gated
            d_h, d_up = rounded(d_h * up, dtype), rounded(d_h * h, dtype)
        d_x = rounded(ops.mlp_backward(d_h, activated)[1], dtype)
        return (None, d_x) if d_up is None else (d_x, d_up)

    def read(name: str) -> Array:
        return parameters[source[name]].view(kind) if name in source else parameters[name]

    new = replace(
        ops, mlp_forward=forward, mlp_backward=backward, rms_norm_forward=norm,
        rms_norm_backward=norm_backward, centre=lambda x: ops.centre(plain(x)),
    )  # fmt: skip
    return own, Lazy([*dict.fromkeys((*parameters, *source))], read), new


def products_in(dtype: str, parts: Parts) -> Parts:
    """Every product of the network reads its operands in `dtype`, one of TF32."""
    config, parameters, ops = parts

    def read(name: str) -> Array:
        return parameters[name].view(KINDS[dtype])

    return config, Lazy(list(parameters), read), ops
