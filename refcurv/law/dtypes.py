"""Names of dtypes of floats, as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

from refcurv.law.checks import ConventionError, require_choice

SPELLED: Final = MappingProxyType(
    {"double": "float64", "single": "float32", "float": "float32", "half": "float16"}
)
"""Names without a number of bits. Those with one are fp32, f32, bf16 and the like."""


def require_float(who: str, what: str, value: object, choices: Iterable[str]) -> str:
    """`require_choice` of a dtype: another name of a dtype suggests that one, or none.

    Letter by letter fp32 is nearer to tf32 than to float32.

    Proof: tests/test_validate_cli.py::test_other_names_of_a_dtype_mean_that_dtype
    """
    known = [str(choice) for choice in choices]
    if not isinstance(value, str) or value in known:
        return require_choice(who, what, value, known)
    short = value.lower().rpartition(".")[2]  # of torch.half
    meant = SPELLED.get(short) or re.sub(r"^(b?)fp?(?=\d)", r"\1float", short)
    if meant not in known and meant == short:
        return require_choice(who, what, value, known)
    hint = f" Did you mean {meant!r}?" if meant in known else ""
    raise ConventionError(
        f"{who}: {what} must be one of {', '.join(known)}; got {value!r:.80}.{hint}"
    )
