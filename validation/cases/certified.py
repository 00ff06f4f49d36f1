"""Version 2 of the valid cases: every number that balls enclose, correctly rounded, with its proof.

    python -m validation.cases.certified            all of them anew; needs the extra `certified`
    python -m validation.cases.certified --render   their part of README.md, from the manifests

A case of version 2 stands beside that of version 1, which stays as it is. It has the same weights,
corpus and drawn labels, and is made from the file of version 1 alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from refcurv.algebra.balls import Balls, bits
from refcurv.certified.certificate import Enclosed, enclosed
from refcurv.certified.labels import label_of
from refcurv.files import store
from refcurv.files.disk import write_json
from refcurv.judge.cases.case import Case, Check, build, kind_of, law_digest, manifest
from refcurv.judge.cases.harness import NEEDS, budgets
from refcurv.model.sampling import uniforms
from refcurv.progress import Progress, silent
from refcurv.terminal import progress_bar
from validation.cases.allowed import allowed
from validation.cases.contained import UNDECIDED, Array, Ball, radii, settled
from validation.cases.enclosures import enclosures
from validation.cases.make import PAGE, VECTORS, manifests

FOLDER = VECTORS.with_name("certified")
COMMAND = "python -m validation.cases.certified"
SCHEMA = "refcurv-cases-2"

BITS = 320
"""Bits of the balls.  Chosen: 30 digits and twice what these models lose; `made_of` asks for 30."""

DIGITS = 30
"""Digits that every array must have."""

NULL = "the columns of eigenvalues that may be 0: any basis of their space is one"
NOT_CERTIFIED = {
    "basis.*.U_A": NULL, "basis.*.U_G": NULL,
    "edits.*.weight": "those whose mask has an undecided pair",
}  # fmt: skip
"""Numbers of version 1 that may have no certificate, and why. They stand in its file alone."""

ONE = {"exact.*.fisher": "exact.*.ggn"}
"""What is another name of one real matrix (O11), is seen to overlap, and is certified once."""

GIVEN = ("weights", "corpus", "labels", "drawn")


def stored(name: str, folder: Path = VECTORS) -> Case:
    """A case as its files have it; an array's budget is a check of it."""
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    arrays: dict[str, Array] = {}
    known: list[Check] = []

    def take(path: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            key = path.replace("/", ".")
            arrays[key] = np.asarray(node[()])
            if "budget" in node.attrs:
                known.append(Check(key, ("", ""), 0.0, float(node.attrs["budget"]), 1.0))

    with h5py.File(folder / f"{name}.h5") as file:
        file.visititems(take)
        text = file.attrs.get("config")
    own = {key: told[key] for key in ("area", "result", "of", "reason", "method")}
    config = None if text is None else json.loads(text)
    return Case(id=name, arrays=arrays, config=config, checks=tuple(known),
                needs=tuple(told["needs"]), **own)  # fmt: skip


# ------------------------------------------------------------------ numbers and their proof


@dataclass(frozen=True)
class Certified:
    """An array with its proof. Fields: x, low, relative, absolute (`contained`); largest entry."""

    x: Array
    low: Array
    relative: float
    absolute: float

    @property
    def ball(self) -> Ball:
        """As a reader has it."""
        return Ball(self.x, self.low, radii(self.x, self.low, self.relative, self.absolute))

    @property
    def settled(self) -> int:
        """Entries that are proved to be correctly rounded."""
        return int(settled(self.ball).sum())

    @property
    def digits(self) -> float:
        """The fewest certain digits of an entry, counted from the largest; infinite if exact."""
        largest, worst = (
            float(np.abs(self.x).max(initial=0)),
            float(self.ball.radius.max(initial=0)),
        )
        return math.inf if not worst else math.log10(largest / worst) if largest else 0.0


def certified(x: Balls) -> Certified:
    """The float64 nearest to each number, what is left of it, and radii.

    A number whose ball holds 0, of which nothing but a bound is known, becomes 0 with a low part.
    """
    made: Enclosed = enclosed(x, 29)  # two float64 of each number
    (near, low), radius = made.parts, made.radius
    unsure = x.contains(np.zeros(x.shape)) & (radius > 0)
    covered = np.where(unsure, np.abs(near) + np.abs(low) + radius, 0.0)
    near, low = np.where(unsure, 0.0, near), np.where(unsure, covered, low)
    share = np.divide(radius, np.abs(near), out=np.zeros_like(radius), where=near != 0)
    return Certified(near, low, _up(share), 2 * _up(covered))


def _up(x: Array) -> float:
    """An upper bound of all, which four roundings are far from."""
    worst = float(x.max(initial=0.0))
    return math.nextafter(worst * (1 + 1e-15), math.inf) if worst else 0.0


@dataclass(frozen=True)
class Made:
    """Numbers and their proof; masks, uint8 (`contained.UNDECIDED`); of the labels, what is said.

    Of the labels: how many the real numbers give too; [sequence, position, label, label of the real
    numbers] of others; [sequence, position, label] of those that balls do not decide.
    """

    numbers: dict[str, Certified]
    masks: dict[str, Array]
    drawn: dict[str, Any]


def made_of(case: Case) -> Made:
    """Every number of a valid case of version 1 that balls enclose.

    Raises SystemExit where one has fewer than DIGITS, or is not what version 1 has.
    """
    with bits(BITS):
        balls = {name: x for name, x in enclosures(case) if name in case.arrays}
        require_one(case.id, balls)
        drawn = drawn_again(case, balls)
        masks = {n: balls.pop(n).rounded().astype(np.uint8) for n in [*balls] if _is_mask(n)}
        made = Made(
            {n: certified(x) for n, x in balls.items() if kind_of(n) not in ONE}, masks, drawn
        )
    for name, mask in masks.items():
        if ((mask != case.arrays[name]) & (mask != UNDECIDED)).any():
            raise SystemExit(f"{case.id}: {name} is proved to be another than in version 1.")
    real = {n: one.x for n, one in made.numbers.items()}
    for name, one in made.numbers.items():
        far, budget = off(case, name, one.x), allowed(case, name, real)
        if budget is None or not far <= budget:
            raise SystemExit(
                f"{case.id}: {name} is {far:.1e} from version 1, which allows {budget}."
            )
        if one.digits < DIGITS and np.abs(one.x).any():
            raise SystemExit(f"{case.id}: {name} has {one.digits:.1f} digits. Raise BITS.")
    return made


def _is_mask(name: str) -> bool:
    return kind_of(name) == "edits.*.mask"


def off(case: Case, name: str, x: Array) -> float:
    """|version 1 − x|, of as many columns as x has."""
    one = case.arrays[name]
    return float(np.linalg.norm(x - (one[:, : x.shape[1]] if ".U_" in name else one)))


def drawn_again(case: Case, balls: Mapping[str, Balls]) -> dict[str, Any]:
    """SAMPLING of the real numbers beside the labels that float64 drew; see `Made`."""
    law, same = case.arrays["drawn"], 0
    other: list[list[int]] = []
    unknown: list[list[int]] = []
    for n, t in np.argwhere(law >= 0).tolist():
        u = uniforms(case.method["seed"], 0, n, law.shape[1])[t]
        label, own = label_of(balls["logits"][n, t], float(u)), int(law[n, t])
        if label is None:
            unknown.append([n, t, own])
        elif label != own:
            other.append([n, t, own, label])
        else:
            same += 1
    return {"same": same, "other": other, "undecided": unknown}


def require_one(id: str, balls: Mapping[str, Balls]) -> None:
    """Raise SystemExit where two names of one matrix are proved to be two."""
    for kind, other in ONE.items():
        for name in (n for n in balls if kind_of(n) == kind):
            same = balls[name.replace(kind.rpartition(".")[2], other.rpartition(".")[2])]
            if not balls[name].overlaps(same).all():
                raise SystemExit(f"{id}: {name} is not {other}.")


# ------------------------------------------------------------------ files


def write(case: Case, made: Made, folder: Path) -> dict[str, Any]:
    """ID_v2.h5 and ID_v2.json; returns the manifest."""
    given, numbers = {n: x for n, x in case.arrays.items() if _given(n)}, made.numbers
    arrays = {**given, **{name: one.x for name, one in numbers.items()}, **made.masks}
    two = replace(case, id=f"{case.id.removesuffix('_v1')}_v2", of=case.id, arrays=arrays,
                  needs=NEEDS, checks=tuple(_checks(case, numbers)))  # fmt: skip
    path = folder / f"{two.id}.h5"
    store.write(
        path,
        format="refcurv-case",
        attributes={"case": two.id, "result": two.result, "config": json.dumps(case.config)},
        arrays=_entries(arrays, numbers),
        provenance={"refcurv": build()["refcurv"], "law": law_digest()},
    )
    told = manifest(two, path, budgets(two)) | {
        "schema": SCHEMA,
        "certificate": {
            "command": COMMAND,
            "arithmetic": f"python-flint {metadata.version('python-flint')}, {BITS} bits",
            "bits": BITS,
            "given": given_digest(case),
            "logits are W a + b": (case.config or {}).get("logit_cap") is None,
            "drawn": made.drawn,
            "arrays": {name: _told(one) for name, one in numbers.items()}
            | {name: _of_mask(mask) for name, mask in made.masks.items()},
            "is also": {a: b for a, b in ONE.items() if any(kind_of(n) == a for n in case.arrays)},
            "not certified": {
                kind: why for kind, why in NOT_CERTIFIED.items()
                if any(kind_of(n) == kind and arrays.get(n, x[:0]).size < x.size
                       for n, x in case.arrays.items())
            },
        },
    }  # fmt: skip
    write_json(told, folder / f"{two.id}.json")
    return told


def _given(name: str) -> bool:
    """What no float computed: inputs, labels, which rows are kept, and counts."""
    return name.split(".", maxsplit=1)[0] in GIVEN or name.endswith((".kept", ".n_A", ".n_G"))


def given_digest(case: Case) -> str:
    """SHA-256 of the names and bytes of what both versions are given."""
    made = hashlib.sha256()
    for name in sorted(n for n in case.arrays if n.split(".")[0] in GIVEN):
        made.update(name.encode() + np.ascontiguousarray(case.arrays[name]).tobytes())
    return made.hexdigest()


def _entries(
    arrays: Mapping[str, Array], numbers: Mapping[str, Certified]
) -> Iterator[store.Entry]:
    for name, x in arrays.items():
        one = numbers.get(name)
        if one is None:
            yield store.Entry(name, x)
            continue
        own = {"relative": one.relative, "absolute": one.absolute, "settled": float(one.settled)}
        yield store.Entry(name, x, own)
        yield store.Entry(f"{name}_low", one.low)


def _told(one: Certified) -> dict[str, Any]:
    """What the manifest says of an array."""
    digits = None if one.digits == math.inf else round(one.digits - 0.05, 1)
    return {
        "entries": one.x.size, "settled": one.settled, "digits": digits,
        "radius": float(one.ball.radius.max(initial=0)),
    }  # fmt: skip


def _of_mask(mask: Array) -> dict[str, Any]:
    """The same of a mask, whose settled entries are decided; and how many pairs each row keeps."""
    return {
        "entries": mask.size, "settled": int((mask != UNDECIDED).sum()), "digits": None,
        "radius": 0.0, "kept": (mask == 1).sum(axis=1).tolist(),
    }  # fmt: skip


def _checks(case: Case, numbers: Mapping[str, Certified]) -> Iterator[Check]:
    """How far version 1 is from it, beside what version 1 allows."""
    real = {n: one.x for n, one in numbers.items()}
    for name, one in numbers.items():
        far, size = off(case, name, one.x), float(np.linalg.norm(one.x)) or 1.0
        budget = allowed(case, name, real) or 0.0
        yield Check(name, ("ball arithmetic", "version 1"), far / size, budget / size)


def write_all(folder: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """Every valid case with a network, and the index."""
    told = []
    valid = [m for m in manifests() if m["result"] == "valid" and "forward" in m["needs"]]
    for done, one in enumerate(valid):
        progress(done, len(valid))
        case = stored(one["caseId"])
        told.append(write(case, made_of(case), folder))
    progress(len(valid), len(valid))
    keys = ("caseId", "result", "flags", "needs")
    index = {"schema": SCHEMA, "cases": [{k: one[k] for k in keys} for one in told]}
    write_json(index, folder / "index.json")
    return told


# ------------------------------------------------------------------ the page


def table(told: Sequence[dict[str, Any]]) -> str:
    """Every kind of number: how much of it is certified, and how far version 1 is from it."""
    rows = [
        "| number | arrays | numbers | correctly rounded, proved | digits | version 1 is off by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in told:
        for name, own in one["certificate"]["arrays"].items():
            kinds.setdefault(kind_of(name), []).append(own)
    for kind, found in kinds.items():
        entries, sure = (sum(one[k] for one in found) for k in ("entries", "settled"))
        digits = [one["digits"] for one in found if one["digits"] is not None]
        least = f"{math.floor(min(digits))}" if digits else "all"
        rows.append(
            f"| `{kind}` | {len(found)} | {entries:,} | {sure:,} | {least} | {_off(told, kind)} |"
        )
    rows.append(_of_labels([one["certificate"]["drawn"] for one in told]))
    for kind, other in ONE.items():
        rows.append(f"| `{kind}` | | | is `{other}` (O11) | | |")
    said = [one["certificate"]["not certified"] for one in told]
    for kind in (kind for kind in NOT_CERTIFIED if any(kind in one for one in said)):
        rows.append(f"| `{kind}` | | | not certified: {NOT_CERTIFIED[kind]} | | |")
    return "\n".join(rows) + "\n"


def _off(told: Sequence[dict[str, Any]], kind: str) -> str:
    """The worst error of an array of version 1, over the array, and of its budget."""
    found = [c for one in told for c in one["checks"] if c["quantity"] == kind]
    if not found:  # of masks, whose decided pairs are those of version 1 (`made_of`)
        return "0"
    worst = max(found, key=lambda c: c["error"] / c["budget"] if c["budget"] else 0.0)
    if not worst["error"]:
        return "0"
    return f"{worst['error']:.0e}, {100 * worst['error'] / worst['budget']:.2g} % of its budget"


def _of_labels(drawn: Sequence[dict[str, Any]]) -> str:
    same = sum(one["same"] for one in drawn)
    other, unknown = (sum(len(one[k]) for one in drawn) for k in ("other", "undecided"))
    sure, differ = same + other, f"{other} labels differ"
    return f"| `drawn` | {len(drawn)} | {sure + unknown} | {sure} | all | {differ} |"


def page() -> str:
    """README.md with the table of version 2 as the manifests say."""
    text, made = PAGE.read_text(encoding="utf-8"), table(manifests(FOLDER))
    before, rest = text.split("<!-- certified -->\n")
    _, after = rest.split("<!-- /certified -->\n")
    return f"{before}<!-- certified -->\n{made}<!-- /certified -->\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="the page alone")
    if not parser.parse_args().render:
        begin, new = time.monotonic(), FOLDER.with_name("certified.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write_all(new, progress_bar("certify"))
        shutil.rmtree(FOLDER, ignore_errors=True)
        new.rename(FOLDER)
        print(f"{time.monotonic() - begin:.0f} s")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
