"""What a function was given in the place of a model, a corpus or sequences of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from refcurv.law.checks import ConventionError, RangeError
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model


def require_model(who: str, given: object) -> Model:
    """`given`, or ConventionError: a path, say, is not loaded here.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    if isinstance(given, Model):
        return given
    raise ConventionError(
        f"{who}: the model must be a Model, such as rc.load(path); got {type(given).__name__}."
    )


def require_corpus(who: str, given: object) -> Corpus:
    """`given`, or ConventionError: a path, say, is not loaded here.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    if isinstance(given, Corpus):
        return given
    raise ConventionError(
        f"{who}: the corpus must be a Corpus, such as rc.load_corpus(path); got "
        f"{type(given).__name__}."
    )


def numbers_of(who: str, corpus: Corpus, sequences: Iterable[object]) -> list[int]:
    """Rows of the corpus in the order given: at least one integer, each in range.

    What is wrong is refused at once, however many follow.

    Proof: tests/test_hostile.py::test_sequences_are_whole_numbers_in_range
    """
    count, found = len(corpus.label), []
    for n in sequences if isinstance(sequences, Iterable) else [sequences]:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise RangeError(f"{who}: sequences must be integers, rows of the corpus; got {n!r}.")
        if not 0 <= n < count:
            raise RangeError(f"{who}: sequence {n} does not exist; the corpus has {count}.")
        found.append(int(n))
    if not found:
        raise RangeError(f"{who}: give at least one sequence.")
    return found
