"""validation/AUDIT.md and DEVIATIONS.md: nothing in them dangles, and nothing is stale."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from refcurv.judge.identities.proved import PROOFS  # noqa: E402
from validation import traceability  # noqa: E402
from validation.traceability import ROWS, Row  # noqa: E402

TESTS = set(traceability.all_tests())
DEVIATIONS = (ROOT / "validation" / "DEVIATIONS.md").read_text(encoding="utf-8")
REPORTS = (ROOT / "validation" / "REPORTS.md").read_text(encoding="utf-8")


def test_every_id_has_its_row() -> None:
    wanted = [f"P{n}" for n in range(1, 12)] + [f"O{n}" for n in range(1, 67)]
    assert [row.id for row in ROWS] == wanted


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_no_row_dangles(row: Row) -> None:
    tests = traceability.tests_of(row)
    for name in row.functions:
        assert inspect.getdoc(traceability.function(name)), f"{name} says nothing of itself"
    for test in tests:
        assert test in TESTS, f"{row.id}: no test {test}"
    if traceability.built(row):
        assert tests, f"{row.id} is computed, and nothing proves it"
    else:
        assert row.waits and not tests, f"{row.id}: not built, yet proved; or for no reason"


def test_tests_named_after_an_id_name_one_that_exists() -> None:
    for test in TESTS:
        for number in re.findall(r"_?O(\d+)_", test.split("::")[1]):
            assert 1 <= int(number) <= 66, test


def test_the_page_is_what_the_table_says() -> None:
    """`python -m validation.traceability` after a change to the table or to a test's name."""
    assert traceability.PAGE.read_text(encoding="utf-8") == traceability.page()


def test_every_certificate_is_named_and_exists() -> None:
    """What `audit --certify` proves has its row, and the demo model's file says what it proved."""
    rows, told = {row.id for row in ROWS}, traceability.json.loads(traceability.DEMO.read_text())
    assert set(PROOFS) <= set(traceability.CERTIFIED) <= rows
    certified = {row.id: traceability.certified_by(row) for row in ROWS}
    assert {test for found in certified.values() for test in found} <= TESTS
    without = {name for name, found in certified.items() if not found}
    assert without == set(traceability.NOT_CERTIFIED)  # each says why
    proofs = {one["id"]: one for one in told["proofs"]["findings"]}
    assert set(proofs) == set(PROOFS) and not told["failed"]
    for row in ROWS:
        said = traceability.certificates(row, proofs)
        why = f"not certified: {traceability.NOT_CERTIFIED.get(row.id)}"
        assert (said == why) == (row.id in without)
        assert ("demo:" in said) == (proofs.get(row.id, {}).get("verdict") == "proved")
    assert sum(one["verdict"] == "proved" for one in proofs.values()) > 12
    wrong = proofs | {"O16": proofs["O16"] | {"verdict": "fail"}}
    assert "demo:" not in traceability.certificates(Row("O16"), wrong)
    assert traceability.certificates(Row("O12"), proofs).startswith("not certified: statistical")


def test_the_measured_tests_exist() -> None:
    measured = traceability.json.loads(traceability.MEASURED.read_text(encoding="utf-8"))
    assert {test.removeprefix("tests/") for test in measured} <= TESTS
    assert all(0 <= error <= budget for error, budget in measured.values())


def test_every_deviation_has_a_test_that_exists() -> None:
    rows = [line for line in DEVIATIONS.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 8
    for line in rows:
        tests = re.findall(r"`tests/([\w/]+\.py::test_\w+)`", line)
        assert tests, f"no test: {line}"
        for test in tests:
            assert test in TESTS, test


@pytest.mark.parametrize("part", re.split(r"^## ", REPORTS, flags=re.MULTILINE)[1:])
def test_every_report_has_a_source_and_tests_that_exist(part: str) -> None:
    """Source, what it says, what came out, tests; each address once, at least ten of each part."""
    title, _, table = part.partition("\n")
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10 or title.startswith("Loaders")
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    for source, says, came, tests in cells:
        assert re.fullmatch(r"\[[^]]+\]\(https://\S+\)", source), source
        assert says and came
        named = re.findall(r"`tests/([\w/]+\.py::test_\w+)`", tests)
        assert named and set(named) <= TESTS, f"no such test: {tests}"
    assert len({source for source, *_ in cells}) == len(cells)
