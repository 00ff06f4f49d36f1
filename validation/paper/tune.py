"""Choose the demo's layers and rho on the dev split.

    python -m validation.paper.tune refcurv/demo/model.h5 refcurv/demo/corpus.h5

Prints, for each set of layers and each rho, what is left of every skill. The demo takes the
setting whose dev recitation is at most a twentieth of the baseline's at the least rise of
perplexity; the test split is not looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import refcurv as rc
from refcurv.evaluation.suite import RETAINED, Evaluation, compare, measure

LAYERS = (
    "blocks.3.mlp.{gate,up}",
    "blocks.{2-3}.mlp.{gate,up}",
    "blocks.{1-3}.mlp.{gate,up}",
)
RHO = (0.95, 0.93, 0.91, 0.89, 0.88, 0.87, 0.86, 0.85, 0.84, 0.83, 0.82, 0.8, 0.75, 0.7)


def values(table: Evaluation) -> dict[str, float]:
    """Population → strict recitation or accuracy [%], perplexity as it is."""
    return {
        row.name.rpartition("_")[0]: row.after["perplexity"]
        if row.kind == "text"
        else 100 * row.after[RETAINED[row.kind]]
        for row in table.rows
    }


def sweep(model: rc.Model, corpus: rc.Corpus) -> list[dict[str, object]]:
    """One row per setting: layers, rho, share of pairs kept, and the dev values."""
    factors = rc.collect(model, corpus, "blocks.*.mlp.*")
    basis = rc.decompose(factors)
    before = measure(model, corpus, split="dev")
    rows: list[dict[str, object]] = [
        {"layers": "-", "rho": 1.0, "kept": 1.0, **values(compare(before, None))}
    ]
    for layers, rho in tqdm([(layers, rho) for layers in LAYERS for rho in RHO]):
        edited, record = rc.edit(model, basis, {layers: rho})
        table = compare(measure(edited, corpus, split="dev"), before)
        kept = sum(x.kept for x in record.layers) / sum(x.pairs for x in record.layers)
        rows.append({"layers": layers, "rho": rho, "kept": round(kept, 3), **values(table)})
    return rows


def choose(rows: list[dict[str, object]]) -> dict[str, object]:
    """The setting of least perplexity among those that leave a twentieth of the recitation."""
    base, *edits = rows
    enough = [row for row in edits if row["quotes"] <= base["quotes"] / 20]  # type: ignore[operator]
    return min(enough, key=lambda row: row["language"])  # type: ignore[arg-type, return-value]


def main() -> None:
    """Sweep, print, choose."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = sweep(rc.load(args.model, dtype="float32"), rc.load_corpus(args.corpus))
    for row in rows:
        cells = (f"{k} {v:.1f}" if isinstance(v, float) and k not in ("rho", "kept") else f"{v}"
                 for k, v in row.items())  # fmt: skip
        print("  ".join(cells))
    print("chosen:", choose(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
