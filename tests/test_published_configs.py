"""published_configs.json: config.json as the Hub has them, with tiny sizes in place of theirs.

Each converts to the model that it describes, or is refused for a true reason. The keys and values
are the published ones but for sizes, the ids of special tokens, and lists as long as a size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_families import checkpoint
from test_naming import records

from refcurv.files import huggingface, naming, weights
from refcurv.files.huggingface import convert, read_config
from refcurv.files.weights import config_to_json
from refcurv.law.checks import ConventionError
from refcurv.model.config import ModelConfig

TABLE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text(encoding="utf-8")
)
READ = [name for name, row in TABLE.items() if "becomes" in row]
REFUSED = [name for name, row in TABLE.items() if "refused" in row]


def test_the_table_has_every_family_but_one() -> None:
    """Of DeiT the Hub has the teacher's class, which is refused; its others are ViTs."""
    kinds = {TABLE[name]["config"]["model_type"] for name in READ}
    assert kinds == {f.model_type for f in huggingface.FAMILIES} - {"deit"}
    assert len(READ) >= 40 and len(READ) + len(REFUSED) == len(TABLE)


def check(found: ModelConfig, becomes: dict[str, Any]) -> None:
    said = config_to_json(found)
    for field, value in becomes.items():
        if isinstance(value, dict):
            said[field] = {key: said[field][key] for key in value}
        assert json.loads(json.dumps(said[field])) == value, field


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read(name: str) -> None:
    """It says the model that the table expects, and every tensor of it has its place."""
    family, config = read_config("x", json.dumps(TABLE[name]["config"]))
    check(config, TABLE[name]["becomes"])
    made = naming.plan("x", family, config, records(family, config))
    assert set(made.sources) == set(config.parameter_shapes()) and not made.ignored


FIRST = {TABLE[name]["config"]["model_type"]: name for name in reversed(READ)}
"""One of each family converts here; all of them in the slow test below."""


@pytest.mark.parametrize("name", FIRST.values())
def test_a_published_config_converts(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "hf", TABLE[name]["config"], ("float16",))
    mapped = convert(folder, tmp_path / "w.h5")
    found = weights.load(tmp_path / "w.h5").config
    assert {m.name for m in mapped} == set(found.parameter_shapes())
    check(found, TABLE[name]["becomes"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_is_refused_for_its_reason(name: str) -> None:
    row = TABLE[name]
    with pytest.raises(ConventionError) as caught:
        read_config("dir/config.json", json.dumps(row["config"]))
    text, at = str(caught.value), 0
    for part in row["refused"].split(".*"):
        at = text.find(part, at)
        assert at >= 0, text
    assert text.startswith("dir/config.json: ") and "\n" not in text and len(text) < 500


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_transformers_reads_it_alike(tmp_path: Path, name: str) -> None:
    """The same logits from the same folder: every key means here what it means there."""
    pytest.importorskip("torch", reason="extra `peers`")
    from peers_compare import BUDGET, batch, converted, distances, family_of, run_ours, run_theirs

    config = dict(TABLE[name]["config"])
    if config.get("hidden_act") == "gelu_fast":  # its constant has ten digits
        config["hidden_act"] = "gelu_new"
    if (config.get("rope_scaling") or {}).get("type") == "su":  # transformers 5 finds no context
        config["rope_scaling"] = config["rope_scaling"] | {"type": "longrope"}
    folder = checkpoint(tmp_path / "hf", config, ("float64",))
    ours = converted(folder)
    check(ours.config, TABLE[name]["becomes"])
    data = batch(ours.config)
    theirs = run_theirs(folder, family_of(ours), ours.config, data)
    found = distances(run_ours(ours, data), theirs, data)
    assert found["logits"] < BUDGET, found["logits"]
