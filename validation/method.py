"""validation/METHOD.md, read as data: its headings, its statements, and the places of the law."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).with_name("METHOD.md")

ROLES = ("decided", "defined", "fast", "proved")
"""What a place of the law is to it; `fast` may be missing."""


def headings(text: str) -> list[str]:
    """Every heading below the title, in order."""
    return re.findall(r"^##+ (.+)$", text, re.MULTILINE)


def statements(text: str) -> list[tuple[str, str]]:
    """(id, statement) of every row of the tables, in order; of bugs the fault and what it shows."""
    rows = re.findall(r"^\| ([A-Z]\d+) \| (.+) \|$", text, re.MULTILINE)
    return [(id, statement.replace(" | ", ": ")) for id, statement in rows]


def law(text: str) -> Mapping[str, tuple[str, Mapping[str, list[str]]]]:
    """Name → the reason, and the places by role; the headings under The law."""
    chapter = re.split(r"^## ", text, flags=re.MULTILINE)
    (chapter,) = [part for part in chapter if part.startswith("The law\n")]
    out = {}
    for part in re.split(r"^### ", chapter, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        reason, _, places = body.partition("\n- ")
        out[name] = (
            reason,
            {
                role: re.findall(r"`([^`]+)`", found)
                for role, found in re.findall(rf"({'|'.join(ROLES)})((?:\s+`[^`]+`)+)", places)
            },
        )
    return out
