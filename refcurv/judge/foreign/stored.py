"""One array of another program's file: what it declares, and its numbers when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from refcurv.curvature.room import GIB, available
from refcurv.files import safetensors
from refcurv.files.bfloat16 import from_bfloat16
from refcurv.judge.arithmetic import Arithmetic
from refcurv.law.checks import Array, RoomError
from refcurv.law.words import number_of

AXES: Final = {
    **{"A": (1, 2), "G": (1, 2), "U_A": (2,), "mu": (1,), "U_G": (2,), "lam": (1,)},
    **{"Lambda": (2,), "mask": (2,), "W": (2,)},
}
"""The arrays of a layer → how many axes each may have (of a table A is a vector)."""

FLOATS: Final = ("float64", "float32", "float16", "bfloat16")
_WHOLE: Final = ("bool", *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)))
_SMALL: Final = 1 << 26
"""Bytes for which nobody asks how much memory there is. Chosen: any machine has 64 MiB."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An array in a file.

    Fields:
        dtype: a name of FLOATS, of an integer or "bool"; "text"; or what it is instead.
        shape: as declared, and checked against what the file has room for.
        read: the array, without a check of memory (`numbers`); bfloat16 is read as float32.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def numeric(self) -> bool:
        """Does it hold real numbers?"""
        return self.dtype in FLOATS or self.dtype in _WHOLE


def misfit(what: str, key: str, shape: tuple[int, ...]) -> str | None:
    """Why no array of a layer has this shape; None where it may. `key` is one of AXES.

    Proof: tests/test_foreign.py::test_an_array_of_other_axes_is_a_problem_in_every_format
    """
    if len(shape) in AXES[key]:
        return None
    wanted = "a vector" if AXES[key] == (1,) else "a matrix"
    stacked = len(shape) == 1 + max(AXES[key])  # as programs hold blocks that are all alike
    count = number_of(shape[0], "layer") if stacked else ""
    split = f". If its first axis is blocks, store {count}" if stacked else ""
    return f"{what} is {shape}; {wanted} is needed{split}"


def numbers(what: str, stored: Stored) -> Array:
    """The array in float64. What does not fit in memory is refused before it is read.

    Raises:
        RoomError: a file of a few bytes may declare an array of many.

    Proof: tests/test_foreign.py::test_a_bomb_does_not_burst
    """
    need = 16 * math.prod(stored.shape)  # as it is stored, and in float64
    free = available() if need > _SMALL else None
    if free is not None and need > free:
        raise RoomError(
            f"validate: {what}, {stored.shape} of {stored.dtype}, takes {need / GIB:.0f} GiB to "
            f"read; {free / GIB:.1f} GiB are free."
        )
    return stored.read().astype(np.float64)


def count(what: str, value: object, problems: list[str]) -> float | None:
    """A number of rows; None, and a problem, for 0, a negative, a fraction or several."""
    try:
        array = np.asarray(value)
        number = (
            float(array.reshape(-1)[0])
            if array.size == 1 and array.dtype.kind in "iuf"
            else math.nan
        )
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if math.isfinite(number) and number >= 1 and number == int(number):
        return number
    shown = " ".join(repr(value).split())
    problems.append(f"{what} is {shown:.60}, which is no number of rows")
    return None


def common(dtypes: Iterable[str]) -> str | None:
    """`Arithmetic.stored`: the float that all of them are, where it is shorter than float64."""
    every = set(dtypes)
    one = every.pop() if len(every) == 1 else ""
    return one if one in FLOATS[1:] else None


def all_in(dtype: str | None) -> Arithmetic:
    """Of programs that multiply and add in the dtype that they store."""
    return Arithmetic(products=dtype, sums=dtype, stored=dtype if dtype in FLOATS[1:] else None)


def tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The arrays of a safetensors file by name, and the texts of its header."""
    found, texts = safetensors.read_file(path, "validate")

    def of(tensor: safetensors.Tensor) -> Stored:
        def read() -> Array:
            array = safetensors.read_tensor(tensor, "validate")
            return from_bfloat16(array) if tensor.stored == "bfloat16" else array

        return Stored(safetensors.NUMBERS.get(tensor.stored, tensor.stored), tensor.shape, read)

    plain = {key: text for key, text in texts.items() if isinstance(text, str)}
    return {tensor.name: of(tensor) for tensor in found}, plain
