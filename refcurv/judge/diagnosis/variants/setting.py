"""What another program may have done otherwise: one record, and which of it can have occurred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from types import MappingProxyType
from typing import Any, Final

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.variants.networks import CHANGES, PADS, SEEING, Level, occurring
from refcurv.judge.diagnosis.variants.positions import (
    CLASSES,
    OWN,
    ROWS,
    WHERE,
    Positions,
    fault_of_rows,
    positions,
    supervised,
    tails,
    weights,
)
from refcurv.judge.diagnosis.variants.rounding import TF32
from refcurv.judge.diagnosis.variants.texts import TEXTS, fault_of_text, rows_left, texts
from refcurv.judge.diagnosis.variants.untrained import started_otherwise
from refcurv.law.conventions import NO_LABEL, Fisher
from refcurv.model.config import ModelConfig, NormPlace

LABELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sampled": "B15",
        "expected": "B15",
        "empirical": "B15",
        "argmax": "B16",
        "one uniform": "B17",
        "joint": "B18",
        "tempered": "B21",
        "nucleus": "B21",
        "double shift": "B22",
        "drawn, then shifted": "B22",
        "no shift": "B23",
    }
)
"""Other labels than the reference's, and the fault that each is (`labels.sent`)."""

COUNTS: Final[Mapping[str, str]] = MappingProxyType(
    {"reference": "B29", "sequences": "B4", "labels": "B4", "positions": "B4",
     "every sequence": "B36"}
)  # fmt: skip
"""What n may count in the place of the rows that were added.

sequences: those with a row. every sequence: those without one too, where rows are pooled.
"""

POOLING: Final[Mapping[str, str]] = MappingProxyType(
    {"sum": "B36", "mean": "B36", "mean, ones summed": "B36", "batch": "B44",
     "batch and rows": "B44", "batch and rows, row by row": "B44", "batch, row by row": "B44",
     "batch from the end": "B44", "batch from the end, row by row": "B44", "centred": "B45"}
)  # fmt: skip
"""What may be done to rows before they are squared, or to the mean of the squares.

sum, mean: over the rows of a sequence. mean, ones summed: a is divided, and not the 1 of [a; 1].
batch: the mean over the sequences of a batch, position by position; from the end, where programs
pad on the left. row by row: the mean over those that are rows there, in the place of each of them.
batch and rows: the mean over all rows of a batch, once or in the place of each. centred: mean
meanᵀ is subtracted.
"""

REDUCED: Final = ("sum", "mean", "mean, ones summed")
"""What of POOLING leaves one row of a sequence."""

BATCHES: Final = tuple(name for name in POOLING if name[:5] == "batch")
"""What of POOLING takes the mean over a batch."""

MOST: Final = 64
"""Sequences of a batch whose size is looked for.  Chosen: each size is a product of its own."""

INPUTS: Final = (
    "norm's input",
    "norm without gain",
    "attention's input",
    "context",
    "attention's output",
    "attention's update",
    "stream between",
    "mlp's input",
    "gate's output",
    "up's output",
    "activation",
    "hidden",
    "mlp's output",
    "mlp's update",
    "stream behind",
    "mlp's output before",
)
"""Tensors of the layer's block that may stand in the place of its input (B34).

norm without gain: what the norm before the layer gives, but for its gain and its bias, as where
these are a part of the layer's own weights.
"""

OVERWRITTEN: Final = ("residual sum behind it", "residual sum of the block", "last residual sum")
"""Sums that, computed in place, stand in the buffer that the layer or its norm has read (B42)."""

OUTPUTS: Final = ("input", "shared input", "stream", "activation", "update")
"""Gradients that may stand in the place of the layer's output's (B35).

input: of its own input, g W. shared input: of what it and its neighbours read. stream: of the
stream that it or its norm reads. activation: behind the activation. update: behind the norm that
follows the layer.
"""

PARTS: Final = MappingProxyType(
    {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}
)
"""The kinds of linear layers of a block, and the part of the block that each is in."""

SWAPPED: Final = MappingProxyType(
    {f"the other of {one} and {two}": (one, two) for one, two in combinations(PARTS, 2)}
)
"""The gradient of the output of another layer of the same block: the two are swapped."""

FUSED: Final = ({"q", "k", "v"}, {"gate", "up"})
"""Kinds of layers that programs may hold in one matrix, of which each is a part."""

OTHER_SIDE: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"as if padding were on the right": ("apart",), "as if padding were on the left": SEEING}
)
"""Rows that are counted from the other side than the padding's, and what padding may then see."""


HALVES: Final = MappingProxyType({f"output in float16 at 2^{k}": 2.0**k for k in range(-30, 25)})
"""The output's gradient as float16 holds it where the loss is this many times the sum (B61)."""

OPERANDS: Final = MappingProxyType({f"operand in {dtype}": dtype for dtype in TF32})
"""A layer's own input, or its output's gradient, as a product reads it that squares it (B60)."""


_OF_A: Final[Mapping[str, str | None]] = MappingProxyType(
    {"input": None, **dict.fromkeys(OVERWRITTEN, "B42"), **dict.fromkeys(OPERANDS, "B60")}
)
_OF_G: Final[Mapping[str, str | None]] = MappingProxyType(
    {"output": None, **dict.fromkeys(HALVES, "B61"), **dict.fromkeys(OPERANDS, "B60")}
    | {k: "B34" for k, pair in SWAPPED.items() if any({*pair} <= one for one in FUSED)}
)
"""The fault of a tensor in the place of the input, or of the output, where not B34 or B35."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What another program did otherwise. Every default is "as the reference".

    Fields:
        labels: one of LABELS. amount: the temperature, or the mass of the nucleus.
        smoothing: ε of label smoothing. z_loss: c of a loss that has c logsumexp² more.
        where: at which positions labels are (`positions.WHERE`, `positions.OWN`).
        text: what is read in the place of the corpus (`texts.reading`); token: the one it is about.
        rows_A, rows_G: which positions are rows (`positions.ROWS`). count: one of COUNTS.
        pooling_A, pooling_G: of POOLING. batch: sequences of a batch, 0 for all; for B44.
        tensor_A, tensor_G: of INPUTS or OVERWRITTEN, and of OUTPUTS, HALVES or SWAPPED; or of
            OPERANDS.
        network: changes of the arithmetic (`networks.CHANGES`), each with its level.
        pads: what a position of padding sees (`networks.Network`): no fault by itself.
        mean: where labels are drawn, is the mean over all draws taken: no fault, but the way to
            compare with labels that nobody knows.
        redraw: where the reference has no label but `where` has, that of another draw: no fault.
    """

    labels: str = "reference"
    amount: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    where: str = "labelled"
    text: str = "the corpus"
    token: int = NO_LABEL
    rows_A: str = "reference"
    rows_G: str = "reference"
    count: str = "rows"
    pooling_A: str = "none"
    pooling_G: str = "none"
    batch: int = 0
    tensor_A: str = "input"
    tensor_G: str = "output"
    network: tuple[Level, ...] = ()
    pads: str = "blind"
    mean: bool = False
    redraw: int = 0

    @property
    def faults(self) -> tuple[str, ...]:
        """The ids of what differs, in the order of the fields."""
        # labels everywhere make rows of all
        bare = self.count == "reference" or self.where in CLASSES
        own = self.labels == "no shift" and self.where in OWN  # a token is its own label there
        found = [
            LABELS.get(self.labels),
            "B26" if self.smoothing or self.z_loss else None,
            None if own else WHERE.get(self.where),
            fault_of_text(self.text),
            None if bare else fault_of_rows(self.rows_A),
            None if bare else fault_of_rows(self.rows_G),
            COUNTS.get(self.count),
            POOLING.get(self.pooling_A),
            POOLING.get(self.pooling_G),
            _OF_A.get(self.tensor_A, "B34"),
            _OF_G.get(self.tensor_G, "B35"),
            *(CHANGES[name].fault for name, _ in self.network),
        ]
        return tuple(dict.fromkeys(fault for fault in found if fault))

    @property
    def alike(self) -> tuple[str, ...]:
        """Other ids that leave the same trace.

        An activation in place shows what is behind it. Another layer's gradient may have come with
        its name. A text with its start token, whose row is left out, may have lost it by a rule for
        rows.
        """
        first = "without first" in (self.rows_A, self.rows_G)
        swapped = ("B38",) * (self.tensor_G in SWAPPED)
        return ("B42",) * (self.tensor_G == "activation") + swapped + ("B20",) * first

    def alike_of(self, fault: str | None) -> tuple[str, ...]:
        """Those of the fields that are this fault."""
        each = [Setting(**{f.name: getattr(self, f.name)}) for f in fields(self)]
        return tuple(id for one in each if fault in one.faults for id in one.alike)

    @property
    def sides(self) -> frozenset[str]:
        """Which of "A" and "G" can differ from the reference's."""
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        A = changed & {"rows_A", "count", "pooling_A", "tensor_A", "network", "text"}
        G = changed - {"rows_A", "pooling_A", "tensor_A", "pads", "mean", "redraw"}
        return frozenset(side for side, some in (("A", A), ("G", G)) if some)

    @property
    def words(self) -> str:
        """What differs, in words: "labels tempered (0.7), rows of A with last"."""
        level = {name: f" ({size:g})" if size else "" for name, size in self.network}
        said = {
            "labels": f"labels {self.labels}" + (f" ({self.amount:g})" if self.amount else ""),
            "smoothing": f"labels smoothed by {self.smoothing:.4g}",
            "z_loss": f"{self.z_loss:.4g} logsumexp² in the loss",
            "where": f"labels at {self.where}",
            "text": f"{self.text}" + (f" ({self.token})" if self.token >= 0 else ""),
            "rows_A": f"rows of A {self.rows_A}",
            "rows_G": f"rows of G {self.rows_G}",
            "count": f"n counts {self.count}",
            "pooling_A": f"A by {self.pooling_A}",
            "pooling_G": f"G by {self.pooling_G}" + (f" of {self.batch}" if self.batch else ""),
            "tensor_A": f"a is {self.tensor_A}",
            "tensor_G": f"g is that of {self.tensor_G}",
            "network": ", ".join(name + size for name, size in level.items()),
            "pads": f"padding sees {self.pads}",
        }
        own = {f.name: f.default for f in fields(self)}
        return ", ".join(text for name, text in said.items() if getattr(self, name) != own[name])

    @property
    def run(self) -> Setting:
        """The part that decides a and g at every position; the rest only adds them up otherwise."""
        labels = ("labels", "amount", "smoothing", "z_loss", "where", "mean", "redraw")
        names = (*labels, "text", "token", "network", "pads")
        return Setting(**{name: getattr(self, name) for name in names})

    @property
    def read(self) -> Setting:
        """The part that decides a at every position."""
        names = ("text", "token", "network", "pads")
        return Setting(**{name: getattr(self, name) for name in names})


REFERENCE: Final = Setting()


def combined(one: Setting, two: Setting) -> Setting | None:
    """Both at once; None if they say different things of one field.

    Two changes of the arithmetic go together unless they are the same one.
    """
    merged: dict[str, Any] = {}
    for name in (f.name for f in fields(Setting)):
        mine, other, none = (getattr(s, name) for s in (one, two, REFERENCE))
        if name == "network":
            if {level[0] for level in mine} & {level[0] for level in other}:
                return None
            merged[name] = mine + other
        elif none not in (mine, other):
            # what is no fault by itself may agree
            if mine != other or name not in ("mean", "pads", "amount", "batch"):
                return None
            merged[name] = mine
        else:
            merged[name] = other if mine == none else mine
    pooled = {merged["pooling_A"], merged["pooling_G"]} & {*REDUCED}
    pooled_count = merged["count"] in ("rows", "every sequence")
    return None if pooled and not pooled_count else Setting(**merged)


# ------------------------------------------------------------------ what can have occurred


def settings(case: Case) -> list[Setting]:
    """All single deviations that can occur with the model and the corpus of a case.

    Empty without them. A deviation that needs two fields (pads as rows, and what pads then see)
    counts as one.

    Proof: tests/test_judge_variants.py::test_every_deviation_differs
    """
    if case.model is None or case.corpus is None:
        return []
    config, parameters = case.model.config, case.model.parameters
    at = positions(case.corpus, config, case.reference.rows)
    found = [*_labels(case.reference.fisher, at), *_where(case.reference.fisher, at)]
    found += _classes(case.reference.fisher, at, config.vocabulary)
    found += [*_rows(at), *_tails(case, at), *_counts(at), *_pooling(case, at), *_tensors(config)]
    found += _texts(case, at)
    started = case.once("started", lambda: started_otherwise(config, parameters))
    found += [Setting(network=(level,)) for level in occurring(config, at, started)]
    return list(dict.fromkeys(found))


def theirs_n(case: Case) -> float | None:
    """The rows of A that the dump counts, by its first layer; None where it does not say."""
    return next((case.counts(layer).theirs["A"] for layer in case.matched), None)


def _texts(case: Case, at: Positions) -> Iterator[Setting]:
    assert case.model is not None
    for text, token in texts(at, case.model.config, case.reference.rows, theirs_n(case)):
        yield Setting(text=text, token=token)


def fitting(case: Case, every: Sequence[Setting]) -> list[Setting]:
    """Other texts that have as many rows as theirs, where that is not our number."""
    n, some = theirs_n(case), [one for one in every if one.text in TEXTS]
    if n is None or not some:
        return []
    assert case.model is not None and case.corpus is not None
    config, rows = case.model.config, case.reference.rows
    at = positions(case.corpus, config, rows)
    if n == at.keep_BT.sum():
        return []
    return [one for one in some if rows_left(at, one.text, one.token, config, rows) == n]


def _labels(fisher: Fisher, at: Positions) -> Iterator[Setting]:
    drawn = fisher is not Fisher.EMPIRICAL
    yield from (Setting(labels=name) for name in (
        ("empirical",) if drawn else ("expected", "sampled")
    ))  # fmt: skip
    yield Setting(labels="argmax")
    if at.images:
        return
    if at.kinds["last"].any():
        yield Setting(labels="argmax", where="every token")
    labels_B = (at.label_BT >= 0).sum(axis=1)
    if labels_B.max(initial=0) > 1:
        yield Setting(labels="joint")
        if drawn:
            yield Setting(labels="one uniform")
    if drawn:
        yield from (Setting(labels="tempered", amount=t) for t in (0.5, 0.7, 0.8, 1.5, 2.0))
        yield from (Setting(labels="nucleus", amount=p) for p in (0.9, 0.95, 0.8))
    if at.inputs.shape[1] > 1:
        shifted = ("drawn, then shifted",) if drawn else ()
        yield from (Setting(labels=name) for name in ("double shift", "no shift", *shifted))
        yield from _unshifted(at)


def _unshifted(at: Positions) -> Iterator[Setting]:
    """Labels that are not shifted, at other positions than the reference's are.

    Proof: tests/test_judge_places.py::test_labels_that_are_not_shifted_are_at_any_token
    """
    before = [supervised("labelled", at)]
    for where in OWN:
        theirs = supervised(where, at)
        if theirs.any() and not any((theirs == one).all() for one in before):
            before.append(theirs)
            yield Setting(labels="no shift", where=where)
    if at.kinds["pads"].any():
        for pads in SEEING:
            yield Setting(labels="no shift", where="ignored everywhere", pads=pads)


def _where(fisher: Fisher, at: Positions) -> Iterator[Setting]:
    """Labels at positions that have none: drawn there, or the next token whatever it is."""
    if at.images:
        return
    drawn = fisher is not Fisher.EMPIRICAL
    kinds = at.kinds
    names = [name for name in ("pads", "prompts", "last") if kinds[name].any()]
    padded = "pads" in names
    if not drawn:
        behind = kinds["last"][:, :-1].any()  # is there a next token in the row?
        names = [f"ignored {name}" for name in names if name != "last" or behind]
    if len(names) > 1:
        names.append("everywhere" if drawn else "ignored everywhere")
    for name in names:
        at_pads = padded and name.endswith(("pads", "everywhere"))
        if not at_pads or (drawn and len(names) > 3 and name == "everywhere"):
            yield Setting(where=name)  # padding on the left sees no text
        for pads in SEEING if at_pads else ():
            yield Setting(where=name, pads=pads)
    if kinds["eos"].any():
        yield Setting(where="without eos")
        yield Setting(where="without eos", rows_A="without eos", rows_G="without eos")


def _classes(fisher: Fisher, at: Positions, vocabulary: int) -> Iterator[Setting]:
    """What is no label is a class, and its positions are rows or not."""
    if at.images or fisher not in (Fisher.SAMPLED, Fisher.EMPIRICAL) or (at.label_BT >= 0).all():
        return
    padded = bool(at.kinds["pads"].any())
    for name in (name for name, index in CLASSES.items() if index >= -vocabulary):
        for pads in ("blind", *SEEING) if padded else ("blind",):  # blind: it stands on the left
            yield Setting(where=name, pads=pads)
        for pads in PADS if padded else ("blind",):
            yield Setting(where=name, rows_A="with pads", rows_G="with pads", pads=pads)


def _rows(at: Positions) -> Iterator[Setting]:
    before = [weights("reference", at)]
    for name in ROWS:
        theirs = weights(name, at)
        if not theirs.any() or any((theirs == one).all() for one in before):
            continue
        before.append(theirs)
        padded = name.startswith("with pads")
        # blind: where every key is hidden from it, real ones and its own
        seen = (*PADS, "blind") if padded else OTHER_SIDE.get(name, ("blind",))
        for pads in seen:
            yield Setting(rows_A=name, rows_G=name, pads=pads)
            yield Setting(rows_A=name, pads=pads)
            if pads == seen[0]:
                yield Setting(rows_G=name, pads=pads)
            if padded or theirs.all():  # the mask is left out, but not of the count
                yield Setting(rows_A=name, count="reference", pads=pads)


def _tails(case: Case, at: Positions) -> Iterator[Setting]:
    """Rows of the last sequences by another rule, if theirs counts as many."""
    n = theirs_n(case)
    for name in () if n is None or at.images else tails(at, n):
        for pads in PADS:
            yield Setting(rows_A=name, rows_G=name, pads=pads)
            yield Setting(rows_A=name, pads=pads)


def _counts(at: Positions) -> Iterator[Setting]:
    n = at.keep_BT.sum()
    other = {
        "sequences": at.keep_BT.any(axis=1).sum(),
        "labels": supervised("labelled", at).sum(),
        "positions": at.real_BT.size,
    }
    yield from (Setting(count=name) for name, size in other.items() if size not in (0, n))


def _pooling(case: Case, at: Positions) -> Iterator[Setting]:
    yield Setting(pooling_A="centred")
    if case.reference.fisher in (Fisher.SAMPLED, Fisher.EMPIRICAL):  # the others' mean is 0
        yield Setting(pooling_G="centred")
    if at.keep_BT.sum(axis=1).max(initial=0) > 1:
        yield from (Setting(pooling_G=G) for G in ("mean", "sum"))
        for A in REDUCED[: 3 if case.joint else 2]:
            yield Setting(pooling_A=A)
            for G in ("mean", "sum"):
                yield Setting(pooling_A=A, pooling_G=G)
                if not at.keep_BT.any(axis=1).all():
                    yield Setting(pooling_A=A, pooling_G=G, count="every sequence")
        yield Setting(pooling_G="batch and rows", batch=1)
    N = len(at.index_B)
    for size in dict.fromkeys(s if s < N else 0 for s in (2, 4, 8, N)):
        if N > 1:
            yield Setting(pooling_G="batch", batch=size)
            yield Setting(pooling_G="batch and rows", batch=size)


def batches(case: Case) -> Iterator[Setting]:
    """G by means over batches of any size."""
    assert case.model is not None and case.corpus is not None
    at = positions(case.corpus, case.model.config, case.reference.rows)
    for size in range(2, min(len(at.index_B), MOST) + 1):
        for name in BATCHES:
            if not (name.startswith("batch from the end") and at.real_BT.all()):
                yield Setting(pooling_G=name, batch=size)


def _tensors(config: ModelConfig) -> Iterator[Setting]:
    lacks = set()
    if not config.gated:
        lacks |= {"gate's output", "activation"}  # its `hidden` is the activation
    if config.norm_place is NormPlace.PRE:
        lacks |= {"attention's update", "mlp's update"}
    if config.norm_place is NormPlace.POST:
        lacks |= {"norm's input", "norm without gain"}
    if not (config.norm_gain or config.norm_bias):
        lacks |= {"norm without gain"}
    if config.layers == 1:
        lacks |= {"mlp's output before"}
    # of tensors that are the same the first is named
    yield from (Setting(tensor_A=name) for name in (*OVERWRITTEN, *INPUTS) if name not in lacks)
    for name in OUTPUTS:
        if name != "update" or config.norm_place is not NormPlace.PRE:
            yield Setting(tensor_G=name)
    size = {
        x.rpartition(".")[2]: shape[0]
        for x, shape in config.linear_layers().items()
        if x.startswith("blocks.")
    }
    for name, (one, two) in SWAPPED.items():
        if size.get(one) is not None and size.get(one) == size.get(two):
            yield Setting(tensor_G=name)


def averaged(setting: Setting) -> Setting:
    """The same, with the mean over all labels that the model could draw."""
    return replace(setting, mean=True)
