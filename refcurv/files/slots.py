"""How a checkpoint's tensors hold our weights: whole, stacked, turned, by heads, as a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig


class Form(StrEnum):
    """How a checkpoint's tensor holds our weights W (d_out, d_in).

    rows: W itself, or several W stacked: [W_q; W_k; W_v].
    turned: the transpose of `rows` (GPT-2's Conv1D).
    heads: the rows of W_q, W_k and W_v of the first head, then those of the second, and so on.
    patch: W as the kernel of a convolution, (d_out, channels, side, side).
    bare: a vector or matrix whose name has no `.weight`, with leading axes of length 1 up to three.
    """

    ROWS = "rows"
    TURNED = "turned"
    HEADS = "heads"
    PATCH = "patch"
    BARE = "bare"


@dataclass(frozen=True, slots=True)
class Slot:
    """One module of a checkpoint.

    Fields:
        theirs: its name; `*` is the number of a block.
        ours: the names of our layers that it holds, in order.
        form: how it holds them.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = Form.ROWS


def tensor_shape(slot: Slot, config: ModelConfig, parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor, from those of our parts."""
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    if slot.form is Form.TURNED:
        return shape[::-1]
    if slot.form is Form.BARE:
        return (1,) * (3 - len(shape)) + shape
    if slot.form is Form.PATCH and len(shape) == 2:
        image = config.image
        assert image is not None
        return shape[0], image.channels, image.patch, image.patch
    return shape


def join(slot: Slot, config: ModelConfig, parts: list[Array]) -> Array:
    """Our parts → the checkpoint's tensor, the same numbers bit for bit."""
    shape = tensor_shape(slot, config, [part.shape for part in parts])
    if slot.form is Form.HEADS:
        by_head = [part.reshape(config.heads, config.head_width, -1) for part in parts]
        return np.concatenate(by_head, axis=1).reshape(shape)
    joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return joined.T if slot.form is Form.TURNED else joined.reshape(shape)


def split(
    slot: Slot, config: ModelConfig, tensor: Array, parts: list[tuple[int, ...]], index: int
) -> Array:
    """The reverse of `join`: the checkpoint's tensor → our part `index` of those shapes."""
    if slot.form is Form.HEADS:
        by_head = tensor.reshape(config.heads, len(parts), config.head_width, -1)
        return np.ascontiguousarray(by_head[:, index]).reshape(parts[index])
    joined = tensor.T if slot.form is Form.TURNED else tensor
    start = sum(part[0] for part in parts[:index])
    if len(parts) > 1:
        joined = joined[start : start + parts[index][0]]
    return np.ascontiguousarray(joined).reshape(parts[index])
