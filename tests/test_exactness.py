"""README.md: every statement of exactness names its certificate, or says "not certified"."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from validation.traceability import CERTIFIED  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")

EXACT = (
    r"\bexact(ly|ness)?\b|to the bit|same bits|bit for bit|byte for byte|\b1e-\d|\bto rounding"
    r"|\bdigits?\b|\bprove[sd]?\b|\bequals?\b"
)
"""What a statement of exactness says."""

LINKS = {
    "validation/certified/README.md": "radius",
    "validation/cases/README.md": "certified/",
    "validation/AUDIT.md": "demo: ",
}
"""Pages that have certificates, and what shows that they do."""

STATEMENTS = {
    "names its certificate, a radius that ball arithmetic proves": "what a certificate is",
    "transformers' within 1e-12 in float64 (": "not certified",
    'the verdict reads "equal as bfloat16"': "what a verdict says of others' factors",
    "lie within radii that ball arithmetic proves": "validation/certified/README.md",
    "30 digits and more": "validation/certified/README.md",
    "Identities are proved to thirty digits": "validation/AUDIT.md",
    "is taken block by block (`--memory 6GB`": "what two runs of floats have alike",
    "the same bits as in memory": "what two runs of floats have alike",
    "Every gradient equals a complex step": "O15",
    "is the Hessian, exact to rounding": "O14",
    "The whole Hessian of small decoders": "not certified",
    "Where theory says that K-FAC is exact": "not certified",
    "reach the exact expectation": "not certified",
    "equal those of transformers within 1e-12": "not certified",
    "factors of one model come out equal": "not certified",
    "of version 2 thirty digits are proved": "validation/cases/README.md",
    "defined, computed fast and proved": "where a test stands, of all kinds",
}
"""Every statement by a part of it → its page, the row of AUDIT.md, or "not certified".

Sentences that are no statement of exactness, though they have one of its words, say what they are.
"""


def prose(text: str) -> str:
    """Without code, and without what is generated: the law is made of definitions."""
    for mark in ("law", "reading", "bands"):
        text = re.sub(rf"<!-- {mark} -->.*?<!-- /{mark} -->", "", text, flags=re.DOTALL)
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def statements(text: str) -> list[str]:
    """The paragraphs and table rows that say that something is exact, each as one line."""
    parts = re.split(r"\n\n|\n(?=[|#-])", prose(text))
    lines = [" ".join(part.split()) for part in parts]
    sentences = [s for line in lines for s in re.split(r"(?<=[.;!?]) (?=[A-Z`])", line)]
    return [s for s in sentences if re.search(EXACT, re.sub(r"`[^`]*`", "", s))]


def wanting(text: str) -> list[str]:
    """Statements that no entry of STATEMENTS accounts for, or whose certificate is not named."""
    out = []
    for said in statements(text):
        found = [where for part, where in STATEMENTS.items() if part in said]
        if not found or not all(named(where, said, text) for where in found):
            out.append(said)
    return out


def named(where: str, said: str, text: str) -> bool:
    """Does a statement name its certificate, and is that one?"""
    if where == "not certified":
        return "not certified" in said
    if re.fullmatch(r"O\d+", where):
        return f"certified: {where})" in said and where in CERTIFIED
    if where in LINKS:
        row = next(line for line in text.splitlines() if said.strip("| ")[:40] in line)
        return f"]({where})" in row and LINKS[where] in (ROOT / where).read_text(encoding="utf-8")
    assert where.startswith(("what", "where")), where
    return True


def test_every_statement_of_exactness_has_its_certificate() -> None:
    assert wanting(README) == []


def test_no_entry_is_stale() -> None:
    found = statements(README)
    for part in STATEMENTS:
        assert any(part in said for said in found), part


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("exact to rounding (certified: O14)", "exact to rounding"),
        ("exact to rounding (certified: O14)", "exact to rounding (certified: O1)"),
        ("torch.func's within 1e-10 (not certified)", "torch.func's within 1e-10"),
        ("[validation/certified](validation/certified/README.md)", "elsewhere"),
        ("## Reading order", "A and G are right to the bit.\n\n## Reading order"),
        ("## Reading order", "Everything is within 1e-15.\n\n## Reading order"),
        ("## Reading order", "Two programs have the same bits.\n\n## Reading order"),
    ],
)
def test_a_statement_without_one_is_seen(part: str, other: str) -> None:
    assert part in README and wanting(README.replace(part, other))
