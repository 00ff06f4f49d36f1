"""The tables of README.md, from results.json; no other program is needed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results.json"
QUANTITIES = ("A/tr A", "G/tr G", "tr A · tr G")
MARKS = ("factors", "drawn", "findings")


def within(row: dict[str, Any]) -> bool:
    """Is a row of the first table equal in all that is compared?"""
    measured = [row[quantity] for quantity in QUANTITIES]
    measured += [row["Lambda"]] if row["Lambda"] else []
    fine = row["passed"] and row["files"] in ("", "equal")
    return bool(fine) and all(one["error"] <= one["budget"] for one in measured)


def share(one: dict[str, float] | None) -> str:
    """An error and its budget."""
    return f"{one['error']:.1e} / {one['budget']:.1e}" if one else ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def factors(results: dict[str, Any]) -> str:
    """Each program's factors of the same model, tokens and labels."""
    head = ("program", "version", "dtype", "layers", *QUANTITIES, "Λ", "recipe", "verdict")
    head += ("its files",)
    rows = [
        (
            row["program"],
            row["version"],
            row["dtype"],
            str(row["layers"]),
            *(share(row[quantity]) for quantity in QUANTITIES),
            f"{share(row['Lambda'])} per {row['Lambda']['per']}" if row["Lambda"] else "",
            f"{row['recipe']}; rows: {row['rows']}",
            "equal" if within(row) else "; ".join(row["failed"]) or "DIFFERENT",
            row["files"],
        )
        for row in results["factors"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    programs = {row["program"] for row in results["factors"]}
    equal = all(map(within, results["factors"]))
    verdict = "all equal within budget" if equal else "NOT ALL EQUAL"
    said = f"{len(programs)} programs, {len(rows)} rows, {verdict}. {versions}."
    return f"{said}\n\n{table(head, rows)}"


def drawn(results: dict[str, Any]) -> str:
    """Labels and signs that the programs draw."""
    head = ("program", "mode", "draws", "layers", "largest", "mean", "verdict")
    rows = [
        (
            row["program"],
            f"`{row['mode']}`",
            str(row["draws"]),
            str(row["layers"]),
            f"{row['largest']:.2f}",
            f"{row['mean']:.2f}",
            "as drawing explains" if row["passed"] else "DIFFERENT",
        )
        for row in results["drawn"]
    ]
    return table(head, rows)


def findings(results: dict[str, Any]) -> str:
    """What did not come out equal, and why."""
    lines = []
    for one in results["findings"]:
        fault = f" ({one['fault']})" if one["fault"] else ""
        failed = "" if one["holds"] else " NOT REPRODUCED."
        lines.append(f"- **{one['program']}**{fault}: {one['text']}{failed} `{one['where']}`")
    return "\n".join(lines)


def page(text: str, results: dict[str, Any]) -> str:
    """README.md with everything generated in place."""
    for name, render in zip(MARKS, (factors, drawn, findings), strict=True):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{render(results)}\n{end}{after}"
    return text
