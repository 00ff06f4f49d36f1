"""Images: checked, of the size that the model reads, and cut into patches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from refcurv.law.checks import (
    Array,
    DTypeError,
    EmptyError,
    ShapeError,
    as_array,
    require_finite,
    require_shape,
)
from refcurv.model.config import ModelConfig
from refcurv.model.layers import unfold

AXES = "(N, C, H, W)"


def as_images(who: str, images: ArrayLike) -> Array:
    """Images as (N, C, H, W) float32, C order, of the very values given; may be the array itself.

    Whatever float32 holds exactly is taken: float16, integers of 8 and 16 bits, and float64 whose
    every value is one of float32. Scaling to the model's range is the caller's.

    Raises:
        ShapeError: not four axes. EmptyError: one of C, H, W is 0. NonFiniteError: NaN or infinity.
        DTypeError: not exactly float32.
    """
    array = as_array(who, "images", images, AXES)
    require_shape(who, "images", array, (None, None, None, None), AXES)
    if 0 in array.shape[1:]:
        raise EmptyError(f"{who}: images hold no pixel; got {AXES} = {array.shape}.")
    if array.dtype != np.float64 and not np.can_cast(array.dtype, np.float32):
        raise DTypeError(f"{who}: images must be float32, or exactly so; got {array.dtype}.")
    require_finite(who, "images", array)
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype == np.float64 and (narrow != array).any():
        index = tuple(int(i) for i in np.argwhere(narrow != array)[0])
        raise DTypeError(
            f"{who}: images must be float32, or exactly so; {float(array[index])!r} at "
            f"{list(index)} is not. Round them yourself: images.astype(numpy.float32)."
        )
    return narrow


def require_image_size(who: str, images: Array, config: ModelConfig) -> None:
    """Raise ShapeError unless the images (N, C, H, W) are of the size that the model reads."""
    assert config.image is not None
    wanted = (config.image.channels, config.image.height, config.image.width)
    if images.shape[1:] != wanted:
        raise ShapeError(
            f"{who}: the model reads images of (channels, height, width) = {wanted}; got "
            f"{images.shape[1:]}. Resize them.",
            wanted=wanted,
            got=images.shape[1:],
        )


def patches(config: ModelConfig, images: Array) -> Array:
    """What the patch embedding reads of images (B, C, H, W): (B, n, C·P·P)."""
    assert config.image is not None
    return unfold(images, config.image.patch)
