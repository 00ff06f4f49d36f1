"""What several commands do with what they made."""

from __future__ import annotations


def write_json(path: str | None, data: object) -> None:
    """Write a table as JSON, if `--json` names a file."""
    if path:
        from refcurv.files import disk

        disk.write_json(data, path)


def layers(count: int) -> str:
    """So many layers, in words."""
    return f"{count} layer" + "s" * (count != 1)
