"""Every generated part of validation/paper/README.md, from the result files.

python -m validation.paper.page              # rewrites the tables between their marks
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from validation.paper import claims, lm_tables, vit_tables
from validation.paper.results import DEVELOPMENT, HERE, OTHER, load, read


def blocks() -> Mapping[str, str]:
    """Every generated table by its mark."""
    runs, controls, pictures = load("lm"), load("lm", "without-quotes"), load("vit")
    others = load("lm", OTHER)
    return {
        "claims": claims.table_of(runs, controls, pictures),
        "skills": lm_tables.skills(runs),
        "table1": lm_tables.table1(runs),
        "against": lm_tables.against(runs),
        "kept": lm_tables.kept_by_task(runs),
        "kept-above-chance": lm_tables.kept_by_task(runs, chance=True),
        "forgotten": lm_tables.forgotten(runs),
        "left-out": lm_tables.left_out(runs),
        "special": lm_tables.special(runs, controls),
        "facts": lm_tables.facts(runs),
        "removal": lm_tables.removal(runs),
        "detector": lm_tables.detector(runs),
        "sweep": lm_tables.swept(runs),
        "ratios": lm_tables.ratios(runs),
        "stressed": lm_tables.stressed(runs),
        "coherent": lm_tables.coherent(runs),
        "grid": lm_tables.grid(read(DEVELOPMENT)),
        "arch": lm_tables.architectures(runs, others, load("lm", "llama")),
        "other-claims": claims.table_of(others, load("lm", f"{OTHER}-without-quotes")),
        "other-forgotten": lm_tables.forgotten(others),
        "seconds": lm_tables.seconds(runs),
        "vit-table2": vit_tables.table2(pictures),
        "vit-matched": vit_tables.matched(pictures),
        "vit-layers": vit_tables.layers(pictures),
        "vit-decay": vit_tables.decay(pictures),
        "vit-seconds": lm_tables.seconds(pictures),
    }


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each `<!-- NAME -->` ... `<!-- /NAME -->` holding its table."""
    for name, text in made.items():
        mark = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.S)
        page, count = mark.subn(lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page)
        if count != 1:
            raise SystemExit(f"page: README.md has {count} places for {name!r}, not one.")
    return page


def main() -> None:
    """Rewrite the tables of README.md."""
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text(), blocks()))


if __name__ == "__main__":
    main()
