"""The edits that were made to the weights of a file before, as its provenance lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from refcurv.files import store
from refcurv.law.checks import SchemaError

_ROW: Final = ("rho", "norm", "restored", "joint")
"""What is known of each layer of a past edit."""


def past_edits(header: store.Header) -> tuple[Mapping[str, Any], ...]:
    """The edits that a weights file lists, oldest first (`Model.edits`).

    Older files have no such list, but the rows of the last edit alone.
    """
    told = header.provenance.get("edits")
    if told is None:
        return _from_rows(header.provenance.get("edit"))
    if not isinstance(told, list) or not all(map(_is_edit, told)):
        raise SchemaError(
            f"load: {header.path!r}: provenance 'edits' is no list of edits. Was it written by "
            "refcurv?"
        )
    return tuple(told)


def _is_edit(one: Any) -> bool:
    texts = ("method", "weights", "made_for", "became")
    return (
        isinstance(one, dict)
        and one.keys() >= {*texts, "forced", "layers"}
        and isinstance(one["method"], str)
        and all(one[text] is None or isinstance(one[text], str) for text in texts)
        and isinstance(one["layers"], dict)
        and all(
            isinstance(row, dict) and all(isinstance(row.get(k), float | int) for k in _ROW)
            for row in one["layers"].values()
        )
    )


def _from_rows(rows: Any) -> tuple[Mapping[str, Any], ...]:
    """The one edit that a list of `LayerEdit` rows describes; () if it is no such list."""
    if not isinstance(rows, list) or not rows:
        return ()
    layers = {
        row["layer"]: {"restored": 0.0, "joint": False, **{k: row.get(k) for k in ("rho", "norm")}}
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("layer"), str)
    }
    one = {"method": rows[0].get("method", "kfac") if layers else None, "layers": layers}
    one |= {"weights": None, "made_for": None, "became": None, "forced": False}
    return (one,) if _is_edit(one) else ()
