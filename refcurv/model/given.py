"""What a function was given in the place of a model, a corpus, sequences of it, or an option."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from refcurv.law.checks import ConventionError, RangeError
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model

Kind = TypeVar("Kind")


def _loaded(who: str, given: object, kind: type[Kind], how: str) -> Kind:
    """`given`, or ConventionError: a path, say, is not loaded here."""
    if isinstance(given, kind):
        return given
    name, got = kind.__name__, type(given).__name__
    raise ConventionError(f"{who}: the {name.lower()} must be a {name}, such as {how}; got {got}.")


def require_model(who: str, given: object) -> Model:
    """`given`, or ConventionError for what is no Model.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    return _loaded(who, given, Model, "rc.load(path)")


def require_corpus(who: str, given: object) -> Corpus:
    """`given`, or ConventionError for what is no Corpus.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    return _loaded(who, given, Corpus, "rc.load_corpus(path)")


def is_iterable(given: object) -> bool:
    """Can it be gone through? An array without axes cannot, though it is an Iterable by its type.

    Proof: tests/test_certified_hostile.py::test_whatever_is_given_is_one_line
    """
    try:
        iter(given)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def require_callable(who: str, what: str, given: Callable[..., Any]) -> None:
    """Raise ConventionError for what cannot be called.

    Proof: tests/test_certified_hostile.py::test_whatever_is_given_is_one_line,
        tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if not callable(given):
        raise ConventionError(f"{who}: {what} must be a function; got {given!r:.40}.")


def numbers_of(who: str, corpus: Corpus, sequences: Iterable[object]) -> list[int]:
    """Rows of the corpus in the order given: at least one integer, each in range.

    What is wrong is refused at once, however many follow.

    Proof: tests/test_hostile.py::test_sequences_are_whole_numbers_in_range
    """
    count, found = len(corpus.label), []
    for n in sequences if is_iterable(sequences) else [sequences]:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise RangeError(
                f"{who}: sequences must be integers, rows of the corpus; got {shown(n)}."
            )
        if not 0 <= n < count:
            raise RangeError(f"{who}: sequence {n} does not exist; the corpus has {count}.")
        found.append(int(n))
    if not found:
        raise RangeError(f"{who}: give at least one sequence.")
    return found


def require_flag(who: str, what: str, given: object) -> bool:
    """`given`, or ConventionError for what is neither True nor False.

    Proof: tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if isinstance(given, bool | np.bool_):
        return bool(given)
    raise ConventionError(f"{who}: {what} must be True or False; got {shown(given)}.")


def require_whole(who: str, what: str, given: object, least: int, most: int | None = None) -> int:
    """`given`, or RangeError for what is no integer of at least so much, and at most so much.

    Proof: tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if isinstance(given, int | np.integer) and not isinstance(given, bool) and given >= least:
        if most is None or given <= most:
            return int(given)
    wanted = f"of at least {least}" if most is None else f"in [{least}, {most}]"
    raise RangeError(f"{who}: {what} must be an integer {wanted}; got {shown(given)}.")


def shown(given: object) -> str:
    """What came, in one short line."""
    return " ".join(repr(given).split())[:100]
