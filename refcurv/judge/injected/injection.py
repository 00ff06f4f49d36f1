"""One fault as something that is done to a truth: what A and G are made of, or what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from refcurv.judge.diagnosis.variants import REFERENCE, Setting, combined, moments
from refcurv.judge.injected.truth import Layers, Truth
from refcurv.model.config import TABLES

Change = Callable[[Truth, Layers], Layers]
"""The layers of a dump with the fault; {} where it cannot occur."""

Choose = Callable[[Truth], Setting | None]
"""How A and G are made anew; None where the fault cannot occur."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that can be put into a truth, by a setting or by a change.

    Fields:
        id: of the fault; behind a dash, which form of it ("B50-packed").
        what: what a program does that has it.
        needs: what it is put into (`truth.NEEDS`).
        setting: A and G are made anew by it, in the layers whose names end so (`only`; () for all).
        drawn: it is about drawn labels, which a truth by the corpus's labels has not.
        change: what is done to the layers of a dump.
        declared: what such a dump says of itself.
    """

    id: str
    what: str
    needs: str = "factors"
    setting: Choose | None = None
    only: tuple[str, ...] = ()
    drawn: bool = False
    change: Change | None = None
    declared: Mapping[str, str] = field(default_factory=dict)

    @property
    def fault(self) -> str:
        """The id in the registry."""
        return self.id.partition("-")[0]


def remade(truth: Truth, some: Sequence[Injection], layers: Layers) -> Layers:
    """The layers with A and G by the settings of all of these at once; {} where that cannot be."""
    chosen: list[tuple[Injection, Setting]] = []
    for one in some:
        setting = None if one.setting is None else one.setting(truth)
        if setting is None:
            return {}
        chosen.append((one, setting))
    wanted: dict[Setting, list[str]] = {}
    for name in layers:
        own = [setting for one, setting in chosen if not one.only or name.endswith(one.only)]
        every = _all(own)
        if every is None:
            return {}
        wanted.setdefault(every, []).append(name)
    out = dict(layers)
    for setting, names in wanted.items():
        if setting != REFERENCE:
            linear = [name for name in names if name not in TABLES]
            made = list(moments(truth.case, [setting], linear))
            if not made:
                return {}
            for name, new in made[0][1].items():
                out[name] = replace(out[name], A=new.A, n_A=new.n_A, G=new.G, n_G=new.n_G)
    return out


def _all(settings: Sequence[Setting]) -> Setting | None:
    """All at once, None where two say different things."""
    out = REFERENCE
    for one in settings:
        both = combined(out, one)
        if both is None:
            return None
        out = both
    return out
