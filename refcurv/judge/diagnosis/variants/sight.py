"""What each position sees: which of the rules that hide positions another program has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.layers import causal_layout

EVERYWHERE, IN_WINDOWS, NOWHERE = "everywhere", "in windows", "nowhere"


@dataclass(frozen=True, slots=True)
class Sight:
    """The rules of a network. Every default is "as the model".

    Fields:
        causal: where is what comes later hidden: EVERYWHERE; IN_WINDOWS, in the layers that have
            one; NOWHERE.
        documents: are other documents hidden.
        window: "behind" hides t − s >= w, "around" |t − s| >= w, "none" nothing.
        by: t and s there are a "place" in the sequence, or a "position", which restarts.
        restart: do positions restart with each document.
        padding: is padding seen.
        ahead: how many later positions a causal mask leaves; wider: how many more a window has.
    """

    causal: str = EVERYWHERE
    documents: bool = True
    window: str = "behind"
    by: str = "place"
    restart: bool = True
    padding: bool = False
    ahead: int = 0
    wider: int = 0

    @property
    def name(self) -> str:
        """The rules that it has not, in words."""
        causal = {NOWHERE: "no causal mask", IN_WINDOWS: "no causal mask where no window is"}
        behind = "windows behind" if self.causal == NOWHERE else None
        window = {"around": "windows on both sides", "none": "no windows", "behind": behind}
        words = [
            causal.get(self.causal),
            "documents see each other" if not self.documents else None,
            "positions go on" if not self.restart else None,
            window[self.window],
            "windows count positions" if self.by == "position" else None,
            "padding attended" if self.padding else None,
            "a position sees the next" if self.ahead else None,
            {1: "windows of one more", -1: "windows of one less"}.get(self.wider),
        ]
        return ", ".join(word for word in words if word)

    def occurs(self, config: ModelConfig, at: Positions) -> bool:
        """Can it be of this model, and does it differ there from every other one?"""
        windows, T = any(config.windows), at.real_BT.shape[1]
        inside_BT = at.real_BT[:, 1:] & (at.segment_BT[:, 1:] != at.segment_BT[:, :-1])
        return (
            not at.images
            and config.causal
            and T > 1
            and (self.documents or bool(inside_BT.any()))
            and (windows or self.ahead > 0 or (self.window == "none" and self.causal == NOWHERE))
            and (not self.wider or any(1 < w < T for w in config.windows))
            and (self.causal != IN_WINDOWS or not all(config.windows))
            and (not self.padding or not at.real_BT.all())
        )


KNOWN: Final = (
    Sight(),
    Sight(documents=False),
    Sight(documents=False, restart=False),
    Sight(window="none"),
    Sight(causal=NOWHERE, window="none"),
)
"""The model itself, and what its own layout can say (`networks.CHANGES`)."""


def sights() -> Iterator[Sight]:
    """The others of causal models; each differs from the model and from one another.

    Where what comes later is hidden, a window on both sides is one behind, unless it counts
    positions. Within a document places and positions count alike. The last are off by one.
    """
    causal = (EVERYWHERE, IN_WINDOWS, NOWHERE)
    both = (True, False)
    every = product(
        causal, both, ("behind", "around", "none"), ("place", "position"), both, (False, True)
    )
    for one in (Sight(*values) for values in every):
        apart = one.by == "position"
        if (
            (one.documents and (apart or not one.restart))
            or (apart and (one.window == "none" or not one.restart))
            or (one.window == "around" and one.causal != NOWHERE and not apart)
            or (one.window == "none" and one.causal == IN_WINDOWS)
            or (one.padding and one.causal == EVERYWHERE)
            or one in KNOWN
        ):
            continue
        yield one
    yield from (Sight(ahead=1), Sight(wider=1), Sight(wider=-1))


def visible(at: Positions, one: Sight, window: int, pads: str) -> Array:
    """(B, T, S) bool: does position t see position s, in a layer with a window, 0 for none?

    Padding belongs to the last document. `pads`: what it sees (`networks.Network`).
    """
    real_BT, T = at.real_BT, at.real_BT.shape[1]
    key_BS = real_BT if at.seen_BT is None else at.seen_BT
    key_BS = np.ones_like(real_BT) if one.padding or pads in ("all", "apart") else key_BS
    blind = pads == "blind" and not one.padding and at.seen_BT is None
    query_BT = real_BT if blind else np.ones_like(real_BT)
    segment_BT = at.segment_BT
    if at.seen_BT is None:
        end_B1 = np.maximum(real_BT.sum(axis=1, keepdims=True) - 1, 0)
        last_B1 = np.take_along_axis(segment_BT, end_B1, axis=1)
        segment_BT = np.where(real_BT, segment_BT, last_B1)
    seen_BTS = query_BT[:, :, None] & key_BS[:, None]
    if pads == "apart":
        seen_BTS &= real_BT[:, :, None] == real_BT[:, None]
    ahead_TS = np.arange(T)[:, None] - np.arange(T)
    if one.documents:
        seen_BTS &= segment_BT[:, :, None] == segment_BT[:, None]
    if one.causal == EVERYWHERE or (one.causal == IN_WINDOWS and window):
        seen_BTS &= ahead_TS >= -one.ahead
    if window and one.window != "none":
        far = ahead_TS
        if one.by == "position":
            at_BT = causal_layout(np.ones_like(real_BT), segment_BT).position_BT
            far = at_BT[:, :, None] - at_BT[:, None]
        seen_BTS &= (np.abs(far) if one.window == "around" else far) < window + one.wider
    return np.asarray(seen_BTS)
