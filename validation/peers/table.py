"""Measure every row of tests/peers_zoo.py against transformers, and write the table of README.md.

    python -m validation.peers.table            measures anew (extra `peers`), a minute
    python -m validation.peers.table --render   writes README.md from results.json, without torch

tests/validation/test_parity_table.py fails when README.md is not what results.json says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = (ROOT / "validation" / "peers" / name for name in ("README.md", "results.json"))
KINDS = ("logits", "loss", "gradient", "sum_A", "sum_G", "zero")
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def measure() -> dict[str, Any]:
    """Each row's largest relative differences, over full and padded batches."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy
    import scipy
    import torch
    import transformers
    from peers_compare import (
        BUDGET,
        batch,
        converted,
        distances,
        family_of,
        run_ours,
        run_theirs,
        saved,
        worst,
    )
    from peers_zoo import OF_LENGTHS, ZOO
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    rows: dict[str, Any] = {}
    for name in tqdm(ZOO):
        with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
            ours = converted(hf := saved(name, Path(folder) / "hf"))
            family, config = family_of(ours), ours.config
            found = []
            for padded in (False,) if config.image or name in OF_LENGTHS else (False, True):
                data = batch(config, padded)
                theirs = run_theirs(hf, family, config, data)
                found.append(distances(run_ours(ours, data), theirs, data))
        rows[name] = {
            "family": family.model_type,
            "class": family.architecture,
            "parameters": len(config.parameter_shapes()),
            "layers": len(config.linear_layers()),
            "zeros": sum(key.startswith("zero ") for key in found[0]),
            **{kind: max(worst(one, kind) for one in found) for kind in KINDS},
        }
    versions = {m.__name__: m.__version__ for m in (transformers, torch, numpy, scipy)}
    return {"versions": versions, "budget": BUDGET, "rows": rows}


def render(results: dict[str, Any]) -> str:
    """The table between the marks of README.md."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows, budget = results["rows"], results["budget"]
    families = {row["family"] for row in rows.values()}
    within = all(row[kind] < budget for row in rows.values() for kind in KINDS)
    compared = sum(row["parameters"] for row in rows.values())
    lines = [
        f"{len(families)} families, {len(rows)} rows, {compared} parameters compared; "
        f"{'all' if within else 'NOT ALL'} within {budget:g}. {versions}.",
        "",
        "| row | class | logits | loss | gradients | A | G | parameters | layers | zeros |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        errors = " | ".join(f"{row[kind]:.1e}" for kind in KINDS[:-1])
        zeros = f"{row['zeros']}: {row['zero']:.1e}" if row["zeros"] else "none"
        lines.append(
            f"| {name} | {row['class']} | {errors} | {row['parameters']} | {row['layers']} | "
            f"{zeros} |"
        )
    return "\n".join(lines)


def page(text: str, results: dict[str, Any]) -> str:
    """README.md with the table in place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render(results)}\n{END}{after}"


def main() -> None:
    """Measure, or only render."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--render", action="store_true", help="only write README.md")
    if not parser.parse_args().render:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
