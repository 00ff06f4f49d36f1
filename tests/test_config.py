"""Configurations, names and patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from strategies import config, configs, random_parameters

import refcurv as rc
from refcurv.law.checks import ConventionError, NameUnknownError, RangeError, ShapeError
from refcurv.model.config import ModelConfig, expand

NAMES = [f"blocks.{i}.{n}" for i in range(12) for n in ("attn.q", "mlp.gate", "mlp.up")] + ["head"]


@given(configs())
def test_json_round_trip(made: ModelConfig) -> None:
    assert ModelConfig.from_json(made.to_json()) == made


@given(configs())
def test_every_linear_layer_has_a_weight_of_its_shape(made: ModelConfig) -> None:
    shapes = made.parameter_shapes()
    for layer, (d_out, d_in) in made.linear_layers().items():
        assert shapes[made.weight_of(layer)] == (d_out, d_in)
    assert len(made.linear_layers()) == 7 * made.layers + 1
    assert ("head.weight" in shapes) != made.tied


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("**", 37),
        ("*", 1),
        ("blocks.*.mlp.*", 24),
        ("blocks.{2-3}.mlp.{gate,up}", 4),
        ("blocks.{1,10-11}.**", 9),
        ("blocks.1.*", 0),
        ("head, blocks.0.attn.q", 2),
        ("**.up", 12),
        ("blocks.1*.mlp.up", 3),
        ("blocks.1.mlp", 0),
        ("Head", 0),
        (".*", 0),
        ("blocks.{0-1}.mlp.up,head", 3),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    if count:
        assert len(expand(pattern, NAMES)) == count
    else:
        with pytest.raises(NameUnknownError, match="matches none of"):
            expand(pattern, NAMES)


def test_patterns_keep_file_order() -> None:
    assert expand("head,blocks.3.mlp.up,blocks.1.*.*", NAMES) == [
        "blocks.1.attn.q", "blocks.1.mlp.gate", "blocks.1.mlp.up", "blocks.3.mlp.up", "head"
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["blocks.{3-1}.**", "blocks.{1", "x{", "{a,{b}"])
def test_broken_patterns(pattern: str) -> None:
    with pytest.raises(NameUnknownError):
        expand(pattern, NAMES)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"heads": 3}, ConventionError, "multiple of kv_heads"),
        ({"head_width": 3}, ConventionError, "even"),
        ({"layers": 0}, RangeError, "layers must be a positive integer"),
        ({"width": True}, RangeError, "width"),
        ({"width": 4.0}, RangeError, "width"),
        ({"norm_eps": -1.0}, RangeError, "norm_eps"),
        ({"norm_eps": float("nan")}, RangeError, "norm_eps"),
        ({"rope_theta": 10**400}, RangeError, "rope_theta must be finite"),
        ({"rope_theta": "10000"}, RangeError, "rope_theta must be a number"),
        ({"norm_place": "posst"}, ConventionError, "Did you mean 'post'"),
        ({"tied": 1}, ConventionError, "tied"),
    ],
)
def test_contradictions(change: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        config(**change)


@pytest.mark.parametrize("data", [[], {"width": 3}, {**config().to_json(), "colour": 1}])
def test_foreign_json(data: object) -> None:
    with pytest.raises(ConventionError, match="ModelConfig"):
        ModelConfig.from_json(data)


def test_models_refuse_what_their_configuration_does_not_ask_for() -> None:
    made = config()
    parameters = random_parameters(made, 0)
    with pytest.raises(NameUnknownError, match="missing parameters"):
        rc.Model(made, {k: v for k, v in parameters.items() if k != "head.weight"})
    model = rc.Model(made, parameters)
    with pytest.raises(NameUnknownError, match="no parameter 'up'"):
        model.with_parameters({"up": np.zeros(3)})
    with pytest.raises(ShapeError, match=r"head\.weight must be"):
        model.with_parameters({"head.weight": np.zeros(3)})
    with pytest.raises(ConventionError, match="dtype"):
        rc.Model(made, parameters, "float16")


def test_changed_parameters_are_copies_and_the_model_is_frozen() -> None:
    model = rc.Model(config(), random_parameters(config(), 0))
    mine = np.ones(8)
    other = model.with_parameters({"final_norm.weight": mine})
    again = other.with_parameters({"blocks.0.attn_norm.weight": mine})
    mine[:] = 7
    assert (other.parameters["final_norm.weight"] == 1).all()
    assert (again.parameters["final_norm.weight"] == 1).all()
    assert again.parameters["embed.weight"] is model.parameters["embed.weight"]
    assert (model.parameters["final_norm.weight"] != 1).any()
    with pytest.raises(ValueError, match="read-only"):
        other.parameters["final_norm.weight"][0] = 3
    with pytest.raises(AttributeError):
        model.dtype = "float32"  # type: ignore[misc]
