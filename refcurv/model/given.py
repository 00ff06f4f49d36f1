"""What a function was given in the place of a model, a corpus, sequences of it, or an option."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from refcurv.law.checks import (
    Array,
    ConventionError,
    RangeError,
    as_array,
    require_dtype,
    require_shape,
)
from refcurv.model.corpus import Corpus, Population
from refcurv.model.weights import Model

Kind = TypeVar("Kind")


def require_record(who: str, what: str, given: object, kind: type[Kind], how: str) -> Kind:
    """`given`, or ConventionError: a path, say, is not loaded here.

    `what` begins the sentence, as in "the model must be a Model"; `how` is a way to one.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    if isinstance(given, kind):
        return given
    raise ConventionError(f"{who}: {what}, such as {how}; got {type(given).__name__}.")


def require_model(who: str, given: object) -> Model:
    """`given`, or ConventionError for what is no Model.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    return require_record(who, "the model must be a Model", given, Model, "rc.load(path)")


def require_corpus(who: str, given: object) -> Corpus:
    """`given`, or ConventionError for what is no Corpus.

    Proof: tests/test_hostile.py::test_a_path_is_no_model_and_no_corpus
    """
    what = "the corpus must be a Corpus"
    return require_record(who, what, given, Corpus, "rc.load_corpus(path)")


def require_text(who: str, what: str, given: object) -> Population:
    """`given`, or ConventionError for what is no Population of tokens.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    what = f"{what} must be a Population of tokens"
    return require_record(who, what, given, Population, "corpus.populations[name]")


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


def require_bytes(who: str, what: str, given: object) -> None:
    """RangeError for what is no number of bytes, nor None; a text is read by the command line.

    Proof: tests/test_public.py::test_bytes_are_a_number
    """
    if given is None:
        return
    number = isinstance(given, int | float | np.integer | np.floating)
    if not number or isinstance(given, bool) or not given >= 0:  # type: ignore[operator]
        raise RangeError(f"{who}: {what} must be a number of bytes, as 6e9; got {shown(given)}.")


def require_list(who: str, what: str, given: object, example: str) -> list[Any]:
    """`given` as a list; ConventionError for a text, and for what cannot be gone through.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    if isinstance(given, str | bytes) or not is_iterable(given):
        raise ConventionError(f"{who}: {what} must be a list, as {example}; got {shown(given)}.")
    return list(given)  # type: ignore[call-overload,no-any-return]


def require_named(who: str, what: str, given: object, example: str) -> Mapping[str, Any]:
    """`given`, or ConventionError for what maps no names.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConventionError(f"{who}: {what} must map names, as {example}; got {shown(given)}.")
    return given


def as_matrix(who: str, what: str, given: Any) -> Array:
    """`given` as a matrix of real numbers. ShapeError, DTypeError: it is none.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    array = as_array(who, what, given, "a matrix")
    require_dtype(who, what, array, "fiu", "real numbers")
    require_shape(who, what, array, (None, None), "a matrix")
    return array


def require_facts(who: str, what: str, given: object) -> Mapping[str, Any]:
    """`given`, or nothing for None; ConventionError for what JSON does not hold by name.

    Proof: tests/test_public.py::test_whatever_is_given_is_refused_in_one_line
    """
    facts = require_named(who, what, {} if given is None else given, "{'why': 'a trial'}")
    try:
        json.dumps(dict(facts), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ConventionError(f"{who}: {what} must hold what JSON holds: {why:.200}.") from None
    return facts


def shown(given: object) -> str:
    """What came, in one short line."""
    return " ".join(repr(given).split())[:100]
