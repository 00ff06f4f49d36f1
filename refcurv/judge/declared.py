"""What a caller declares of theirs beside the files (`declared=`, `--declare`), checked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from refcurv.law.checks import ConventionError, require_choice, require_range
from refcurv.law.conventions import Bias, Fisher, Rows

CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "fisher": tuple(Fisher),
        "rows": tuple(Rows),
        "bias": tuple(Bias),
        "labels": ("given",),
        "Lambda": ("token", "sequence"),
        "Lambda_over": ("rows", "sequences", "unknown"),
    }
)
NUMBERS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"draws": (1, 2**31), "rho": (0, 1), "loss_terms": (1, 1e12)}
)


def require_declared(given: Mapping[str, str]) -> dict[str, str]:
    """The declarations as texts.

    Raises:
        ConventionError: an unknown key or choice, with the nearest. RangeError: no such number.

    Proof: tests/test_validate_cli.py::test_a_typo_is_refused_with_the_nearest
    """
    if not isinstance(given, Mapping):
        raise ConventionError(
            f"validate: declared must be a mapping, as {{'fisher': 'sampled'}}; got {given!r:.80}."
        )
    for key, value in given.items():
        require_choice("validate", "a declared key", key, [*CHOICES, *NUMBERS])
        if key in CHOICES:
            require_choice("validate", f"the declared {key}", value, CHOICES[key])
    return {key: as_number(key, x) if key in NUMBERS else str(x) for key, x in given.items()}


def as_number(key: str, value: str) -> str:
    """What is declared of a key of NUMBERS, as the text of a number; draws are whole."""
    low, high = NUMBERS[key]
    number = require_range("validate", f"the declared {key}", value, low, high)
    if key != "draws":
        return str(value)
    if number != int(number):
        raise ConventionError(f"validate: the declared draws must be whole; got {value!r}.")
    return str(int(number))
