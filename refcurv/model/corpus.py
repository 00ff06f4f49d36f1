"""The corpus: token sequences or images to compute curvature on, and populations to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from refcurv.law.checks import (
    PART,
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    ShapeError,
    as_integers,
    require_choice,
    require_range,
    require_token_ids,
)
from refcurv.model.config import ModelConfig
from refcurv.model.images import as_images, require_image_size
from refcurv.model.labels import require_labels, shift_labels

KINDS: Final = ("text", "recite", "answer")
"""How a population is judged: perplexity; greedy suffix; exact match of the generated answer."""

IMAGE_KIND: Final = "label"
"""How a population of images is judged: accuracy."""

SPLITS: Final = ("dev", "test")
"""What a population is for: to tune on, or to report."""


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Sequences that are judged alike.

    Fields:
        tokens: (N, T) int32; what lies at or beyond `length` is padding.
        prompt_length: (N,) int32, at least 1: what is given.
        length: (N,) int32, at most T: prompt and what is asked. A `recite` or `answer` population
            asks for at least one token; exactly length − prompt_length of them are decoded.
        kind: One of KINDS.
        split: One of SPLITS.
        chance: The score in [0, 1] that guessing gets.
    """

    tokens: Array
    prompt_length: Array
    length: Array
    kind: str
    split: str
    chance: float = 0.0

    def __post_init__(self) -> None:
        """Own read-only copies; refuse lengths that contradict one another."""
        who = "Population"
        _own_tokens(self, who)
        N, T = self.tokens.shape
        if N == 0:
            raise EmptyError(f"{who}: tokens hold no sequence.")
        for name in ("prompt_length", "length"):
            _own(self, who, name, np.int32, (N,), "(N,)")
        require_choice(who, "kind", self.kind, KINDS)
        _own_judging(self, who)
        asked = 0 if self.kind == "text" else 1
        good = (self.prompt_length >= 1) & (self.prompt_length + asked <= self.length)
        good &= self.length <= T
        if not good.all():
            n = int(np.argmin(good))
            relation = "<" if asked else "<="
            raise RangeError(
                f"{who}: 1 <= prompt_length {relation} length <= {T} must hold for kind "
                f"{self.kind!r}; sequence {n} has prompt_length {self.prompt_length[n]} and length "
                f"{self.length[n]}.",
                index=n,
            )


@dataclass(frozen=True, slots=True, eq=False)
class ImagePopulation:
    """Labelled images that are judged alike: by accuracy, is the likeliest class the label?

    A memorised wrong label and the true one are two populations of the same images: one counts what
    is still recited, the other what is recovered.

    Fields:
        images: (N, C, H, W) float32, the values that the model reads (see Corpus).
        labels: (N,) int32, not negative.
        split: One of SPLITS.
        chance: The accuracy in [0, 1] that guessing gets.
    """

    images: Array
    labels: Array
    split: str
    chance: float = 0.0

    def __post_init__(self) -> None:
        """Own read-only copies; refuse an image without a label."""
        who = "ImagePopulation"
        _own_images(self, who)
        if len(self.images) == 0:
            raise EmptyError(f"{who}: there is no image.")
        _own_judging(self, who)
        if self.labels.min() < 0:
            n = int(np.argmax(self.labels < 0))
            text = f"labels [{n}] is {self.labels[n]}; an image to be judged has a label"
            raise RangeError(f"{who}: {text}.", index=n)

    @property
    def kind(self) -> str:
        """How it is judged: "label"."""
        return IMAGE_KIND


Populations = Mapping[str, Population | ImagePopulation]


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Token sequences of one width, right-padded or packed, or images; and named populations.

    It has tokens or images, never both, and populations of the same.

    Fields:
        tokens: (N, T) int32, or None.
        labels: (N, T) int32 or None: what each position should predict, negative = none. None
            means the next token of the segment (LABELS). Of images (N,), never None; they may be
            noised, as the paper's ViT is trained: see ImagePopulation for how that is judged.
        mask: (N, T) uint8 or None: 1 = real; padding stands on the right.
        segments: (N, T) int32 or None: packed documents, each one contiguous run.
        populations: Mapping from name to Population, or to ImagePopulation; with some, N may be 0.
        source: What the corpus was read from, for provenance (may be empty).
        images: (N, C, H, W) float32, or None: the values that the model reads, scaled as it was
            trained. float16, float64 and integers are taken if float32 holds them exactly.
    """

    tokens: Array | None = None
    labels: Array | None = None
    mask: Array | None = None
    segments: Array | None = None
    populations: Populations = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    images: Array | None = None

    def __post_init__(self) -> None:
        """Own read-only copies; refuse what the law does not allow."""
        who = "Corpus"
        if not isinstance(self.populations, Mapping):
            raise ConventionError(f"{who}: populations must be a mapping of names to Populations.")
        if (self.tokens is None) == (self.images is None):
            what = "neither" if self.tokens is None else "both"
            raise ConventionError(f"{who}: a corpus has tokens or images; got {what}.")
        if self.images is None:
            _check_tokens(self, who)
        else:
            _check_images(self, who)
        if len(self.label) == 0 and not self.populations:
            what = "sequence" if self.images is None else "image"
            raise EmptyError(f"{who}: there is no {what}, and there are no populations.")
        for name in self.populations:
            if not PART.fullmatch(name):
                raise ConventionError(
                    f"{who}: a population's name has no dots, and 1 to 100 of the characters A-Z "
                    f"a-z 0-9 _ + -; got {name!r}."
                )
        object.__setattr__(self, "populations", MappingProxyType(dict(self.populations)))

    @property
    def real(self) -> Array:
        """(N, T) bool: False on padding."""
        if self.mask is None:
            return np.ones(require_tokens("real", self).shape, dtype=bool)
        return self.mask.astype(bool)

    @property
    def segment(self) -> Array:
        """(N, T) int: which document a position belongs to, zeros unless sequences are packed."""
        if self.segments is None:
            return np.zeros(require_tokens("segment", self).shape, np.int32)
        return self.segments

    @property
    def label(self) -> Array:
        """(N, T) int64, of images (N, 1): the corpus's own labels, or LABELS' default."""
        if self.labels is None:
            return shift_labels(require_tokens("label", self), self.real, self.segment)
        labels = self.labels.astype(np.int64)
        return labels if self.images is None else labels[:, None]


def require_tokens(who: str, corpus: Corpus) -> Array:
    """The tokens (N, T); ConventionError for a corpus of images."""
    if corpus.tokens is None:
        raise ConventionError(f"{who}: needs a corpus of tokens; this one has images.")
    return corpus.tokens


def require_kind(who: str, corpus: Corpus, config: ModelConfig) -> None:
    """Raise ConventionError for tokens where the model reads images, or the reverse."""
    if (corpus.images is None) != (config.image is None):
        has, reads = ("tokens", "images") if corpus.images is None else ("images", "tokens")
        raise ConventionError(f"{who}: the corpus has {has}, but the model reads {reads}.")


def require_inputs(who: str, corpus: Corpus, config: ModelConfig) -> None:
    """Refuse a corpus that the model cannot read.

    Raises:
        ConventionError: tokens for a model of images, or the reverse. ShapeError: images of another
        size. RangeError: a token outside the vocabulary.
    """
    require_kind(who, corpus, config)
    if corpus.images is not None:
        require_image_size(who, corpus.images, config)
    else:
        require_token_ids(who, "tokens", require_tokens(who, corpus), config.vocabulary)


def require_fit(who: str, corpus: Corpus, config: ModelConfig) -> Array:
    """The labels (N, T), (N, 1) of images, of a corpus that the model can read and be judged by.

    Raises:
        As `require_inputs`. ConventionError: no labels where LABELS has no default. RangeError: a
        label outside the vocabulary.
    """
    require_inputs(who, corpus, config)
    require_labels(who, config, corpus.labels is not None)
    label_NT = corpus.label
    require_token_ids(who, "labels", np.maximum(label_NT, 0), config.vocabulary)
    return label_NT


# ------------------------------------------------------------------ checks of the records


def _check_tokens(corpus: Corpus, who: str) -> None:
    _own_tokens(corpus, who)
    shape = require_tokens(who, corpus).shape
    for name in ("labels", "mask", "segments"):
        if getattr(corpus, name) is not None:
            dtype = np.uint8 if name == "mask" else np.int32
            _own(corpus, who, name, dtype, shape, "(N, T), as tokens")
    _require_mask(who, corpus.mask)
    _require_runs(who, corpus.segment, corpus.real)
    _require_labels(who, corpus.labels, corpus.real)
    for name, population in corpus.populations.items():
        if not isinstance(population, Population):
            raise ConventionError(f"{who}: population {name!r} has images, the corpus tokens.")


def _check_images(corpus: Corpus, who: str) -> None:
    for name in ("mask", "segments"):
        if getattr(corpus, name) is not None:
            raise ConventionError(f"{who}: {name} is for tokens; this corpus has images.")
    _own_images(corpus, who)
    assert corpus.images is not None
    size = corpus.images.shape[1:]
    for name, population in corpus.populations.items():
        if not isinstance(population, ImagePopulation):
            raise ConventionError(f"{who}: population {name!r} has tokens, the corpus images.")
        if population.images.shape[1:] != size:
            raise ShapeError(
                f"{who}: images of population {name!r} are (C, H, W) = "
                f"{population.images.shape[1:]}, the corpus's {size}."
            )


def _own_judging(record: Population | ImagePopulation, who: str) -> None:
    require_choice(who, "split", record.split, SPLITS)
    object.__setattr__(record, "chance", require_range(who, "chance", record.chance, 0.0, 1.0))


def _own_images(record: Corpus | ImagePopulation, who: str) -> None:
    """Replace images and labels by checked copies: (N, C, H, W) float32 and (N,) int32."""
    given = record.images
    images = as_images(who, given)  # type: ignore[arg-type]  # whatever it is
    if images is given or images.base is not None:
        images = images.copy()
    images.flags.writeable = False
    object.__setattr__(record, "images", images)
    if record.labels is None:
        raise ConventionError(f"{who}: images need labels, one each; -1 = none.")
    _own(record, who, "labels", np.int32, (len(images),), "(N,), one an image")


def _own_tokens(record: Corpus | Population, who: str) -> None:
    """Replace `record.tokens` by a checked copy: (N, T) int32, T >= 1, no negative id."""
    tokens = _own(record, who, "tokens", np.int32, (None, None), "(N, T)")
    if tokens.shape[1] == 0:
        raise EmptyError(f"{who}: tokens must be one position wide or more; T is 0.")
    if tokens.size and tokens.min() < 0:
        index = [int(i) for i in np.argwhere(tokens < 0)[0]]
        raise RangeError(
            f"{who}: tokens {index} is {tokens[tuple(index)]}; ids are not negative. Pad "
            "with any id and say so in the mask or the length.",
            index=index,
        )


def _own(
    record: object, who: str, name: str, dtype: DTypeLike, shape: tuple[int | None, ...], axes: str
) -> Array:
    """Replace a field by a read-only copy of the dtype, exactly; the caller's array stays his."""
    kinds = "iub" if name == "mask" else "iu"
    copy = as_integers(who, name, getattr(record, name), shape, axes, dtype, kinds=kinds)
    copy.flags.writeable = False
    object.__setattr__(record, name, copy)
    return copy


def _require_mask(who: str, mask: Array | None) -> None:
    if mask is None:
        return
    if mask.size and mask.max() > 1:
        raise RangeError(f"{who}: mask holds 0 (padding) and 1 (real); got {mask.max()}.")
    gap = mask[:, 1:] > mask[:, :-1]
    if gap.any():
        n, t = (int(i) for i in np.argwhere(gap)[0])
        raise ConventionError(
            f"{who}: mask allows padding on the right only; in sequence {n} position {t} is "
            f"padding and {t + 1} is real. Was the batch padded on the left?",
            index=(n, t),
        )


def _require_runs(who: str, segment: Array, real: Array) -> None:
    """Each segment id occupies one contiguous run of real positions."""
    ids = np.where(real, segment.astype(np.int64), np.iinfo(np.int64).max)
    runs = (ids[:, 1:] != ids[:, :-1]).sum(axis=1)
    kinds = (np.diff(np.sort(ids, axis=1), axis=1) != 0).sum(axis=1)
    if (runs != kinds).any():
        n = int(np.argmax(runs != kinds))
        raise ConventionError(
            f"{who}: each segment must be one contiguous run; in sequence {n} an id comes back "
            "after another one.",
            index=n,
        )


def _require_labels(who: str, labels: Array | None, real: Array) -> None:
    if labels is None:
        return
    stray = (labels >= 0) & ~real
    if stray.any():
        n, t = (int(i) for i in np.argwhere(stray)[0])
        raise ConventionError(
            f"{who}: labels [{n}, {t}] is {labels[n, t]} on padding, which predicts nothing. Use "
            "-1 there.",
            index=(n, t),
        )
