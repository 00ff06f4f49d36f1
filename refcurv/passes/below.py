"""What the lowest edited block reads of each batch, kept from one edited model to the next.

Edited models that have the same weights below some block compute the same there. So what that block
reads of a batch is computed once, and so are the keys and values below it that decoding goes on
from. Only what a model says itself passes all blocks: other models may say something else.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable, MutableMapping

from refcurv.law.checks import Array
from refcurv.model.layers import Layout
from refcurv.model.transformer import Inputs, KeysAndValues

Past = list[KeysAndValues | None] | None


class Below:
    """States below the block `first`, from which on the models that share this object differ.

    A batch is known by its inputs and its layout, whatever population it is of.

    Args:
        first: the lowest block that is not the same in all of them.
        states: where arrays are kept, in memory or in a file (`files.scratch`).
        most: bytes that may be kept; what does not fit is computed anew for each model.

    Proof: tests/test_sweep.py::test_kept_states_change_no_bit,
        ::test_blocks_below_the_first_edited_one_are_computed_once
    """

    def __init__(self, first: int, states: MutableMapping[Hashable, Array], most: int) -> None:
        self.first, self.bytes = first, 0
        self._states, self._most = states, most
        self._at: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def rise(self, first: int) -> None:
        """From now on the models differ from this higher block on; what is kept serves on."""
        assert first >= self.first
        self.first = first

    def find(self, key: bytes, past: Past) -> tuple[int, Array] | None:
        """A block and what it reads of this batch; fills in `past` below it. None if not kept."""
        with self._lock:
            at = self._at.get(key, 0)
            if not at:
                return None
            if past is not None:
                for i in range(at):
                    past[i] = self._states[key, i, "k"], self._states[key, i, "v"]
            return at, self._states[key, at]

    def keep(self, key: bytes, past: Past, x_BTD: Array) -> None:
        """Keep what block `first` reads of this batch, if there is room."""
        with self._lock:  # two batches that are alike have one key
            before, first = self._at.get(key, 0), self.first
            if not key or before >= first:
                return
            new: dict[Hashable, Array] = {(key, first): x_BTD}
            for i, pair in enumerate(past[:first] if past else []):
                if i >= before and pair is not None:
                    new |= {(key, i, side): one for side, one in zip("kv", pair, strict=True)}
            more = sum(one.nbytes for one in new.values()) - (x_BTD.nbytes if before else 0)
            if self.bytes + more > self._most:
                return
            self.bytes += more
            self._states.update(new)
            self._at[key] = first
            if before:
                del self._states[key, before]


def key_of(kind: str, inputs: Inputs, layout: Layout, told_S: Array | None) -> bytes:
    """What tells a batch from others: how it is read, what, and behind which tokens."""
    made = hashlib.sha256(kind.encode())
    arrays = (inputs, layout.position_BT, layout.first_BT, layout.last_BT, layout.seen_BTS, told_S)
    for array in arrays:
        if array is not None:
            made.update(f"{array.dtype.str}{array.shape}".encode())
            made.update(array.tobytes())
    return made.digest()
