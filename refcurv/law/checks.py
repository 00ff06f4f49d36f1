"""Errors that diagnose, and the checks that raise them.

Each message says who noticed, what must hold, what came, and the likely cause. The classes are
few: a caller distinguishes kinds of trouble, never texts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

LONGEST: Final = 900  # letters in the text of an error, at most

PART: Final = re.compile(r"[A-Za-z0-9_+-]{1,100}")
"""One part of a dotted name, as files hold it."""


class RefcurvError(ValueError):
    """Any input that refcurv refuses, in one line. `status` is the exit status of the command."""

    status = 2

    def __init__(self, message: object, **values: object) -> None:
        text = " ".join(line.strip() for line in str(message).splitlines())  # arrays are of several
        super().__init__(
            text if len(text) <= LONGEST else f"{text[:600]} … {text[603 - LONGEST :]}"
        )
        self.values = values


class ShapeError(RefcurvError):
    """An array has the wrong shape."""


class DTypeError(RefcurvError):
    """An array has the wrong dtype."""


class NonFiniteError(RefcurvError):
    """An array holds NaN or infinity."""


class NotSymmetricError(RefcurvError):
    """A matrix that must be symmetric is not, by more than rounding."""


class NotPSDError(RefcurvError):
    """A second moment has an eigenvalue that rounding cannot have made negative."""


class ConventionError(RefcurvError):
    """A choice that the law does not know, or that contradicts another choice."""


class SchemaError(RefcurvError):
    """A file is not what it says it is, or not a refcurv file."""


class ChecksumError(SchemaError):
    """Stored bytes do not match their SHA-256."""


class EmptyError(RefcurvError):
    """There is nothing to compute with: no rows, no labels, no layers, no mass."""


class RangeError(RefcurvError):
    """A number or an index lies outside its range."""


class NameUnknownError(RefcurvError):
    """A layer, parameter or population that does not exist, or a pattern that matches none."""


class StorageError(RefcurvError):
    """The machine failed, not the input: disk full, permission, read error."""

    status = 3


class RoomError(RefcurvError):
    """The machine cannot hold the job: too little memory, or a library with integers too short."""

    status = 3


class SolverError(RefcurvError):
    """LAPACK or ARPACK did not converge on a matrix that it should solve."""

    status = 3


def require_shape(
    who: str, what: str, array: Array, shape: Sequence[int | None], axes: str, hint: str = ""
) -> None:
    """Raise ShapeError unless `array` has `shape`; None is any length, `axes` names the lengths."""
    got = np.shape(array)
    if len(got) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, got, strict=True)
    ):
        return
    wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    text = f"{who}: {what} must be {wanted} = {axes}; got {got}." + (f" {hint}" if hint else "")
    raise ShapeError(text, wanted=tuple(shape), got=got)


def require_dtype(who: str, what: str, array: Array, kinds: str, wanted: str) -> None:
    """Raise DTypeError unless the dtype's kind letter is in `kinds`."""
    if array.dtype.kind not in kinds:
        raise DTypeError(f"{who}: {what} must hold {wanted}; got {array.dtype}.")


def as_array(who: str, what: str, given: Any, axes: str) -> Array:
    """`given` as an array, not copied. ShapeError: ragged lists. DTypeError: masked entries."""
    if np.ma.is_masked(given):
        raise DTypeError(f"{who}: {what} has masked entries. Fill them: numpy.ma.filled.")
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = _ragged(given) or " ".join(str(error).split())
        raise ShapeError(f"{who}: {what} must be {axes}; {why}") from None


def _ragged(given: Any) -> str:
    """Names the first row whose length differs from row 0's; empty if there is none."""
    if not isinstance(given, Sequence) or not given:
        return ""
    lengths = [len(row) if isinstance(row, Sequence | np.ndarray) else None for row in given]
    for n, length in enumerate(lengths):
        if length != lengths[0]:
            both = ("no list" if x is None else f"of length {x}" for x in (lengths[0], length))
            return "row 0 is {}, row {} is {}. Pad them to one length.".format(next(both), n, *both)
    return ""


def as_integers(
    who: str,
    what: str,
    given: Any,
    shape: Sequence[int | None],
    axes: str,
    dtype: DTypeLike = np.int64,
    *,
    kinds: str = "iu",
) -> Array:
    """A copy of `given` as integers of `dtype`, exactly: nothing is rounded or wrapped.

    Raises:
        ShapeError: `given` is no array (ragged lists), or has another shape (`require_shape`).
        DTypeError: it holds floats, texts, None, or nothing but booleans (`kinds` without "b").
        RangeError: it holds a number outside the range of `dtype`.

    Proof: tests/test_corpus.py::test_what_is_no_matrix_of_ids_is_refused_everywhere
    """
    array = as_array(who, what, given, axes)
    if array.size:  # NumPy makes an array of floats from an empty list
        require_dtype(who, what, array, kinds, "integers")
    require_shape(who, what, array, shape, axes)
    require_dtype(who, what, array, kinds, "integers")
    info = np.iinfo(np.dtype(dtype))
    if array.size and not (info.min <= array.min() and array.max() <= info.max):
        raise RangeError(
            f"{who}: {what} must fit {np.dtype(dtype)}; they span {array.min()} to {array.max()}."
        )
    return array.astype(dtype, order="C")


def require_finite(who: str, what: str, array: Array, hint: str = "") -> None:
    """Raise NonFiniteError naming the first index that is NaN or infinite."""
    finite = np.isfinite(array)
    if finite.all():
        return
    index = tuple(int(i) for i in np.argwhere(~finite)[0])
    many = f"{int((~finite).sum())} of {finite.size} are not finite." + (f" {hint}" if hint else "")
    raise NonFiniteError(
        f"{who}: {what} holds {array[index]} at {list(index)}; {many}", index=index
    )


def overflow_hint(dtype: DTypeLike) -> str:
    """Why a number computed in `dtype` may be infinite or NaN, and what to do about it."""
    real = np.zeros(0, dtype).real.dtype
    wider = ", or compute in float64" if real.itemsize < 8 else ""
    return f"NaN in the weights, or products beyond the range of {real}: check the weights{wider}."


def require_range(who: str, what: str, value: float | str, low: float, high: float) -> float:
    """Return `value` as a float, or raise RangeError unless low <= value <= high."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RangeError(f"{who}: {what} must be a number; got {value!r:.80}.") from None
    if not low <= number <= high:
        raise RangeError(f"{who}: {what} must lie in [{low:g}, {high:g}]; got {value!r}.")
    return number


def require_choice(who: str, what: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, or raise ConventionError with the nearest one."""
    known = [str(choice) for choice in choices]
    if isinstance(value, str) and value in known:
        return str(value)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"{value!r:.80}." + (f" Did you mean {near[0]!r}?" if near else "")
    raise ConventionError(f"{who}: {what} must be one of {', '.join(known)}; got {hint}")


def require_seed(who: str, seed: int) -> int:
    """Return the seed, or raise RangeError unless it is an integer in [0, 2**64) (SAMPLING)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise RangeError(f"{who}: seed must be an integer in [0, 2**64); got {seed!r:.80}.")
    return int(seed)


def require_draws(who: str, draws: int) -> int:
    """Return `draws`, or raise RangeError unless it is an integer in [1, 2**31)."""
    if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws < 2**31:
        raise RangeError(f"{who}: draws must be an integer in [1, 2**31); got {draws!r:.80}.")
    return draws


def require_token_ids(who: str, what: str, ids: Array, vocabulary: int) -> None:
    """Raise RangeError unless all ids lie in [0, vocabulary)."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        index = [int(i) for i in np.argwhere(ids == bad)[0]]
        raise RangeError(
            f"{who}: {what} {index} is {bad}, outside the model's vocabulary [0, {vocabulary}). "
            "Were they made with another tokenizer?",
            index=index,
        )
