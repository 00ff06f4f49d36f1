"""validation/peers: README.md is what the last measured run wrote; ADDING.md works as written."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from test_families import check_round_trip, checkpoint

from refcurv.files import families, huggingface, keys
from refcurv.files.families import FAMILIES
from validation.peers import table

ADDING = table.ROOT / "validation/peers/ADDING.md"


def test_the_page_shows_the_last_results() -> None:
    results = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text, results) == text


def test_every_family_is_measured_within_budget() -> None:
    results = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    rows = results["rows"]
    assert {row["family"] for row in rows.values()} == {f.model_type for f in FAMILIES}
    assert len(FAMILIES) >= 13
    for name, row in rows.items():
        assert max(row[kind] for kind in table.KINDS) < results["budget"] == 1e-12, name
    zoo = ast.parse((table.ROOT / "tests/peers_zoo.py").read_text(encoding="utf-8")).body
    made = next(n.value for n in zoo if isinstance(n, ast.AnnAssign) and n.target.id == "ZOO")
    assert list(rows) == [ast.literal_eval(key) for key in made.keys]


def test_a_family_is_added_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of ADDING.md: the family, and the small config.json that it is tried on."""
    family_block, config_block = re.findall(
        r"```python\n(.*?)```", ADDING.read_text(encoding="utf-8"), re.DOTALL
    )[:2]
    names = {**vars(keys), **vars(families)}
    exec(family_block, names)
    exec(config_block, names)
    new, small = names["SEED_OSS"], names["SMALL"]["seed_oss"]
    assert new.model_type not in {family.model_type for family in FAMILIES}
    monkeypatch.setattr(huggingface, "FAMILIES", (*FAMILIES, new))
    folder = checkpoint(tmp_path / "hf", {"model_type": "seed_oss", **small})
    check_round_trip(folder, tmp_path)
    with pytest.raises(huggingface.ConventionError, match="the key 'surprise' is unknown"):
        huggingface.read_config("x", json.dumps({"model_type": "seed_oss", "surprise": 1, **small}))
