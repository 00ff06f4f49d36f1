"""The text that each command prints, made of the dictionaries that it also writes as JSON.

`convert` and `export` have theirs in `refcurv.report.conversion`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import floor

from refcurv.curvature.forecast import Forecast
from refcurv.law.conventions import describe
from refcurv.law.words import number_of
from refcurv.progress import size, span
from refcurv.report.blocks import by_block
from refcurv.report.cells import (
    MISSING,
    Json,
    decimal,
    number,
    plain,
    rho_text,
    scientific,
    small,
)
from refcurv.report.table import (
    Table,
    agreement_table,
    certainty_table,
    edit_table,
    evaluation_table,
    kept_table,
    past_table,
    tables,
)
from refcurv.report.text import continued, filled, format_rows, printable, shorten, terminal_width


def format_results(results: Json) -> str:
    """Everything a run found, as one text, no wider than a terminal.

    Args:
        results: the dictionary of `refcurv demo`, results.json.

    Returns:
        Title, settings, then the tables: populations in the file's order, nDCG@10, the controls,
        pairs and mass kept per edited layer, band ratios of the edited layers. No newline at the
        end.

    Proof:  tests/test_report.py::test_table_has_every_number
    """
    head = [shorten(printable(str(results.get("title") or "refcurv")), terminal_width())]
    settings = results.get("settings") or {}
    if settings:
        head.append(filled(printable(settings_line(settings))))
    told = [filled(printable(f"warning: {one}")) for one in results.get("warnings") or ()]
    return "\n\n".join(["\n".join(head), *told, *map(_titled, tables(results))])


def settings_line(settings: Json) -> str:
    """ρ, layers, and as far as they are known Fisher, seed and dtype, on one line.

    Proof: tests/test_report.py::test_settings_that_are_not_known_are_left_out
    """
    rho = settings.get("rho")
    where = "" if isinstance(rho, Mapping) else f" on {settings.get('layers', MISSING)}"
    words = {"fisher": "Fisher ", "seed": "seed ", "dtype": ""}
    known = (f"{word}{settings[key]}" for key, word in words.items() if key in settings)
    return "; ".join(filter(None, (f"ρ {rho_text(rho)}{where}", ", ".join(known))))


def format_evaluation(evaluation: Json) -> str:
    """The table of `refcurv evaluate`, with or without a baseline.

    Args:
        evaluation: `Evaluation.to_json()`.

    Proof:  tests/test_report.py::test_without_a_baseline_there_is_one_column
    """
    kinds = (evaluation_table, certainty_table, agreement_table)
    tables = (kind(evaluation) for kind in kinds)
    return "\n\n".join(_titled(table) for table in tables if table.rows)


def format_corpus(counts: Json) -> str:
    """The text of `refcurv corpus`: nothing is left out, cut or ignored without a word.

    Args:
        counts: of the corpus's `source["made_from"]`.

    Proof:  tests/test_texts.py::test_the_command
    """
    return filled("\n".join(_corpus_lines(counts)))


def _corpus_lines(counts: Json) -> Iterator[str]:
    if counts.get("rows"):
        yield (
            f"{_several(counts, 'documents')}, {_several(counts, 'tokens')} → "
            f"{_several(counts, 'rows')} of {counts['width']:,}: "
            f"{number_of(counts['padding'], 'position')} of padding, "
            f"{_several(counts, 'cuts')} within documents, "
            f"{number_of(counts['unlabelled'], 'token')} without a label"
        )
        if counts["limit"] == counts["tokens"]:
            yield f"rows end at {_several(counts, 'tokens')}, the limit"
    for name, found in counts["populations"].items():
        yield (
            f"{name}: {found['kind']}, {found['split']}, {_several(found, 'rows')} of at most "
            f"{found['width']:,}: {_several(found, 'tokens')}, {found['asked']:,} of them asked for"
        )
    parts = [counts, *counts["populations"].values()]
    if empty := sum(part.get("empty", 0) for part in parts):
        yield f"left out: {number_of(empty, 'document')} without a token"
    if straddling := sum(part.get("straddling", 0) for part in parts):
        some = number_of(straddling, "prefix", "prefixes")
        yield f"{some} cut within a token, which is asked for with the suffix"
    if others := sum(part.get("other_split", 0) for part in parts):
        yield f"left out: {number_of(others, 'pair')} of the other split"
    if counts["ignored_keys"]:
        yield f"keys ignored: {', '.join(map(repr, counts['ignored_keys']))}"


def _several(counts: Json, key: str) -> str:
    """A count beside its key, which is a plural."""
    return number_of(counts[key], key.removesuffix("s"))


def format_edit(record: Sequence[Json]) -> str:
    """The table of `refcurv edit`, and what rounding and earlier edits add to it.

    Args:
        record: `EditRecord.to_json()`.

    Proof:  tests/test_report.py::test_edit_table
    """
    past = past_table(record)
    return "\n\n".join(map(_titled, [edit_table(record), *([past] if past.rows else [])]))


def format_kept(found: Sequence[Json]) -> str:
    """Which share of the pairs each ρ keeps, by layer, and a word on what that depends on.

    Args:
        found: `Settling.to_json()` of each layer.

    Proof:  tests/test_settling.py::test_what_decompose_and_inspect_say
    """
    table = kept_table(found)
    lines = [format_rows(table.headers, table.rows, table.align)]
    known, few = (sum(bool(one[key]) for one in found) for key in ("settles", "few"))
    if known:
        lines.append(
            "settles at: with about so many rows a share is 0.95 of its limit, as halves tell"
        )
    if few:
        layers = number_of(few, "layer")
        lines.append(
            f"few rows: of {layers} the share may be an artefact, see refcurv collect --help"
        )
    return "\n".join([lines[0], *map(filled, lines[1:])])


def format_forecast(found: Forecast) -> str:
    """`12 layers, 33,500 tokens: about 4.0 min, 1.3 GiB of memory, 780.0 MB on disk`.

    Proof:  tests/test_forecast.py::test_the_line
    """
    work = number_of(found.layers, "layer")
    work += f", {found.of}" if found.of else ""
    memory = found.memory / 2**30
    return (
        f"{work}: about {span(found.seconds)}, {memory:.{1 if memory >= 1 else 2}f} GiB of memory, "
        f"{size(found.disk)} on disk"
    )


def format_start(start: Json) -> str:
    """One line: which weights an edit started from, and what had been done to them before.

    Args:
        start: `Start.to_json()` of the record.

    Proof:  tests/test_report.py::test_what_an_edit_starts_from_is_one_line
    """
    line = f"starts from weights {digest_text(start.get('weights'))}"
    if earlier := start.get("earlier") or ():
        line += f", edited before by {', then '.join(map(_past_edit, earlier))}"
        line += "; kept, mass and norm are of what that left"
    else:
        line += ", of which no earlier edit is known"
    if start.get("forced"):
        line += f"; forced: what chose was made from others, {digest_text(start.get('made_for'))}"
    elif start.get("made_for") is None:
        line += "; the basis does not say which weights it was made from"
    return printable(line)


def digest_text(digest: object) -> str:
    """The first letters of a digest; "unknown" without one."""
    return str(digest)[:12] if digest else "unknown"


def _past_edit(edit: Json) -> str:
    """`kfac 0.6 of blocks.0.mlp.up and 1 more`."""
    layers: Json = edit["layers"]
    shares = sorted({number(row["rho"]) for row in layers.values()})
    first = next(iter(layers), MISSING)
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    share = " to ".join(plain(x) for x in dict.fromkeys((shares[0], shares[-1]))) if shares else ""
    forced = " (forced)" if edit.get("forced") else ""
    return f"{edit['method']} {share} of {first}{more}{forced}"


def format_inspect(facts: Json) -> str:
    """The text of `refcurv inspect`: what a file is, what it was made with, what it holds.

    Args:
        facts: of `refcurv.files.inspect.inspect_file`; on a terminal long values are shortened.

    Arrays of one kind are one line, as in `convert`: `blocks.{0-29}.attn.q.weight`.

    Proof:  tests/test_report.py::test_inspect_names_every_array,
        ::test_inspect_of_a_large_model_is_a_short_table,
        ::test_inspect_shows_a_text_of_several_lines_on_one,
        ::test_inspect_says_which_decisions_of_the_law_were_others
    """
    pairs = [(what, dict(facts.get(what) or {})) for what in ("attributes", "provenance")]
    if isinstance(law := pairs[1][1].get("conventions"), Mapping):
        pairs[1][1]["conventions"] = _beside_ours(law)
    if facts["format"] in MADE_FROM:
        pairs[0][1].setdefault("weights", "not recorded: made by an older refcurv")
    tables = [
        Table(what, ("name", "value"), tuple((k, _compact(v)) for k, v in found.items()), "ll")
        for what, found in pairs
    ]
    tables += [_past_table(edit) for edit in facts.get("edits") or ()]
    rows = tuple(_arrays(facts["entries"]))
    tables.append(Table("arrays", ("name", "shape", "stored as", "size", ""), rows, "lllrl"))
    lines = [shorten(printable(line), terminal_width()) for line in _what_it_is(facts)]
    kept = [format_kept(facts["kept"])] if facts.get("kept") else []
    shown = (_titled(table) for table in tables if table.rows)
    return "\n\n".join(["\n".join(lines), *kept, *shown])


def _arrays(entries: Sequence[Json]) -> Iterator[tuple[str, ...]]:
    """A line for each array; those that differ in the number of their block alone share one."""
    every = []
    for one in entries:
        more = {key: _compact(value) for key, value in one["attributes"].items()}
        source = more.pop("checkpoint_name", "")
        shape = " × ".join(map(str, one["shape"])) or "scalar"
        facts = ", ".join(f"{key} {value}" for key, value in more.items())
        every.append((str(one["name"]), source, shape, str(one["stored"]), facts))
    for (name, source, shape, stored, facts), members in by_block(every, (0, 1)):
        several = f"{len(members)} of {shape}" if len(members) > 1 else shape
        told = (f"checkpoint_name {source}" if source else "", facts)
        yield (
            name,
            several,
            stored,
            size(sum(entries[at]["nbytes"] for at in members)),
            ", ".join(part for part in told if part),
        )


def _what_it_is(facts: Json) -> Iterator[str]:
    """Path, format, size; of a weights file also its digest and what was done to it."""
    yield str(facts["path"])
    which = "every checksum" if facts["version"] > 1 else "the arrays' checksums"
    yield (
        f"{facts['format']}, version {facts['version']}: "
        f"{number_of(len(facts['entries']), 'array')}, "
        f"{size(facts['nbytes'])}, {which} verified"
    )
    edits = facts.get("edits") or ()
    edited = f", edited by {', then '.join(map(_past_edit, edits))}" if edits else ""
    if facts.get("weights"):
        yield f"weights {digest_text(facts['weights'])}{edited}"


MADE_FROM = ("refcurv-factors", "refcurv-basis")
"""Files that say which weights they were made from."""


def _past_table(edit: Json) -> Table:
    """What a past edit left of each layer."""
    title = f"edited by {printable(str(edit['method']))}, {digest_text(edit.get('weights'))} → "
    title += digest_text(edit.get("became")) + (", forced" if edit.get("forced") else "")
    rows = tuple(
        (name, plain(row["rho"]), decimal(row["norm"]), small(row["restored"]))
        for name, row in edit["layers"].items()
    )
    return Table(title, ("layer", "share", "‖W'‖/‖W‖", "restored"), rows, "lrrr")


def _beside_ours(law: Json) -> str:
    """The law that a file was made by: which of its decisions this version does not have so."""
    ours = describe()
    others = [name for name in {**ours, **law} if law.get(name) != ours.get(name)]
    if not others:
        return f"{number_of(len(law), 'decision')}, word for word this version's"
    return f"{number_of(len(others), 'decision')} in other words than this version's: " + (
        "; ".join(others)
    )


def _compact(value: object) -> str:
    """A text as it is, names and their texts side by side, anything else as JSON on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if isinstance(value, dict) and value and all(isinstance(one, str) for one in value.values()):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return json.dumps(value, ensure_ascii=False, default=str)


def format_audit(audit: Json) -> str:
    """The text of `refcurv audit`: each identity, what failed and where, what was not checked.

    Args:
        audit: `Audit.to_json()`.

    Proof:  tests/test_audit.py::test_the_text_names_what_failed_and_what_was_left_out
    """
    findings, plan = audit["findings"], audit["plan"]
    rows = [
        (f["verdict"], f["id"], scientific(f["error"]), scientific(f["budget"]), f["statement"])
        for f in findings
    ]
    counts = {v: sum(f["verdict"] == v for f in findings) for v in ("pass", "fail", "left out")}
    lines = [
        f"{number_of(plan['sequences'], 'sequence')} of {number_of(plan['width'], 'position')}; "
        f"errors are relative, budgets "
        f"from float64",
        "",
        format_rows(("", "id", "error", "budget", "identity"), continued(rows), "llrrl"),
        "",
    ]
    for finding in findings:
        if finding["verdict"] == "fail":
            where = printable(finding["where"])
            lines.append(f"FAIL {finding['id']}: {finding['statement']} Not so: {where}.")
    lines += [f"not checked: {printable(reason)}" for reason in plan["left_out"]]
    lines.append(
        f"{counts['pass']} hold, {counts['fail']} fail, {counts['left out']} left out (not of "
        f"this model, or too large); {audit['seconds']:.0f} s"
    )
    lines += _proofs(audit["proofs"]) if audit.get("proofs") else []
    return "\n".join(lines)


def _counted(findings: list[Json]) -> Iterator[str]:
    """From what digits count, where it is not from the terms of the identity."""
    yield "digits count from the largest of the terms that an identity adds up"
    of = {f["id"]: f["counted"] for f in findings if isinstance(f["digits"], float)}
    for counted in dict.fromkeys(one for one in of.values() if one):
        ids = ", ".join(name for name, one in of.items() if one == counted)
        yield f"those of {ids}, which may all be 0, from the largest of {counted}"
    yield ""


def _proofs(found: Json) -> Iterator[str]:
    """What ball arithmetic proved, and what it did not."""
    findings, plan = found["findings"], found["plan"]
    if plan["width"]:
        rows = [
            (f["verdict"], f["id"], _certain(f["digits"]), f["statement"])
            for f in findings
            if f["verdict"] != "left out"
        ]
        yield ""
        width = number_of(plan["width"], "position")
        yield f"proved by ball arithmetic, {width}, {found['bits']} bits:"
        yield ""
        yield format_rows(("", "id", "digits", "identity"), rows, "llrl")
        yield ""
        yield from _counted(findings)
    for finding in findings:
        where, statement = printable(finding["where"]), finding["statement"]
        if finding["verdict"] == "fail":
            yield f"FAIL {finding['id']}: {statement} Proved to be otherwise: {where}."
        if finding["verdict"] == "undecided":
            yield f"not decided: {finding['id']}, {where}"
    for why in dict.fromkeys(f["where"] for f in findings if f["verdict"] == "left out"):
        ids = ", ".join(f["id"] for f in findings if f["where"] == why)
        yield f"not proved: {ids}: {printable(why)}"
    proved = sum(f["verdict"] == "proved" for f in findings)
    every = number_of(len(findings), "identity", "identities")
    yield f"{proved} of {every} proved; {found['seconds']:.0f} s"


def _certain(digits: float | str | None) -> str:
    """Digits that are certain, rounded down."""
    return "" if digits is None else digits if isinstance(digits, str) else f"{floor(digits)}"


def _titled(table: Table) -> str:
    return f"{table.title}\n{format_rows(table.headers, table.rows, table.align)}"
