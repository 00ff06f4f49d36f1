"""What several commands do with what they made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def write_json(path: str | None, data: object) -> None:
    """Write a table as JSON, if `--json` names a file."""
    if path:
        from refcurv.files import disk

        disk.write_json(data, path)


def made(table: Mapping[str, Any], *sources: Mapping[str, Any]) -> dict[str, Any]:
    """A table, and with what it was made and from which files: equal names may be other models.

    Proof: tests/test_cli.py::test_a_table_says_what_it_was_made_from
    """
    from refcurv.files import store

    return {**table, "provenance": store.provenance(inputs=store.inputs(*sources))}


def layers(count: int) -> str:
    """So many layers, in words."""
    return f"{count} layer" + "s" * (count != 1)
