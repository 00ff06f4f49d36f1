"""Six other programs' factors of one small model, judged; README.md is written.

    python -m validation.peers.curvature             measures anew (requirements.txt), two minutes
    python -m validation.peers.curvature --render    writes README.md from results.json alone
    python -m validation.peers.curvature --keep tests/data/foreign    and keeps their small files

tests/validation/test_peers_curvature_table.py fails when README.md is not what results.json says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .page import HERE, PAGE, RESULTS, page, within

PACKAGES = ("torch", "transformers", "jax", "numpy", "scipy")
KEPT = ("official", "kronfluence", "bergson")
"""Programs that write files, of which `--keep` keeps those of the float32 run."""


def measure(keep: Path | None) -> dict[str, Any]:
    """All rows and findings."""
    os.environ["TQDM_DISABLE"] = "1"
    sys.path.insert(0, str(HERE.parents[2] / "tests"))
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    from .findings import findings
    from .judged import DRAWN, DTYPES, VARIANTS, drawn, judged
    from .subject import made_in

    rows, others = [], []
    with tempfile.TemporaryDirectory() as place, threadpool_limits(1):
        folder = Path(place)
        subject = made_in(folder)
        for name, variant in tqdm(VARIANTS, disable=False):
            for dtype in DTYPES:
                own = folder / f"{name}-{variant}-{dtype}"
                own.mkdir()
                found, row = judged(subject, name, variant, dtype, own)
                rows.append(row)
                if keep is not None and name in KEPT and dtype == "float32":
                    _keep(found.files, keep / name)
        for name in tqdm(DRAWN, disable=False):
            (own := folder / f"{name}-drawn").mkdir()
            others += drawn(subject, name, own)
        found = [asdict(one) for one in findings(subject)]
        if keep is not None:
            for name in ("w.h5", "c.h5"):
                shutil.copy(folder / name, keep / name)
    versions = {name: version(name) for name in PACKAGES}
    return {"versions": versions, "factors": rows, "drawn": others, "findings": found}


def _keep(files: Path, target: Path) -> None:
    """A copy of what a program wrote."""
    shutil.rmtree(target, ignore_errors=True)
    if files.is_dir():
        shutil.copytree(files, target)
    else:
        target.mkdir(parents=True)
        shutil.copy(files, target)


def main() -> int:
    """Measure, or only render; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--render", action="store_true", help="only write README.md")
    parser.add_argument("--keep", type=Path, help="a folder for their small files")
    given = parser.parse_args()
    if not given.render:
        text = json.dumps(measure(given.keep), indent=1, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    fine = all(map(within, results["factors"])) and all(
        one.get("passed", one.get("holds")) for one in [*results["drawn"], *results["findings"]]
    )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
