"""What a model is given: images cut into patches, labels, and which positions are rows (ROWS)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    ShapeError,
    as_array,
    require_choice,
    require_finite,
    require_shape,
)
from refcurv.law.conventions import Rows
from refcurv.model.config import ModelConfig
from refcurv.model.layers import unfold
from refcurv.model.loss import reached

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


def require_labels(who: str, config: ModelConfig, given: bool) -> None:
    """Raise ConventionError for labels left out where LABELS has no default."""
    if given or (config.image is None and config.causal):
        return
    if config.image is not None:
        raise ConventionError(f"{who}: images have no default labels. Give one for each, -1 none.")
    raise ConventionError(
        f"{who}: a bidirectional model sees the next token, so it is no default label. Give labels "
        "of your own."
    )


def require_rows(who: str, config: ModelConfig, rows: str) -> Rows:
    """The choice of rows, or ConventionError for one that the model cannot have (ROWS)."""
    choice = Rows(require_choice(who, "rows", rows, list(Rows)))
    if config.image is None and choice is Rows.CLS:
        raise ConventionError(f"{who}: rows='cls' is for images; tokens have no such position.")
    if config.image is not None and choice is Rows.LABELLED:
        raise ConventionError(f"{who}: no position of an image has a label. Take rows='all'.")
    if config.image is not None and choice is Rows.CLS and not config.image.specials:
        raise ConventionError(f"{who}: the model's images have no CLS. Take rows='all'.")
    return choice


def kept(
    config: ModelConfig,
    rows: Rows,
    label_BT: Array,
    real_BT: Array | None = None,
    segment_BT: Array | None = None,
) -> Array:
    """ROWS: the positions that enter A and G, (B, T) bool.

    Of images label_BT is (B, 1) and the rest is not read: one without a label has no rows.
    """
    labelled_BT = label_BT >= 0
    if config.image is not None:
        keep_BT = np.repeat(labelled_BT, config.image.positions, axis=1)
        keep_BT[:, 1:] &= rows is not Rows.CLS
        return keep_BT
    assert real_BT is not None and segment_BT is not None
    if rows is Rows.REACHED:
        return reached(label_BT, real_BT, segment_BT, config.causal)
    return real_BT.copy() if rows is Rows.ALL else labelled_BT
