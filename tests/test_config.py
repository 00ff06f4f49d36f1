"""Configurations, names and patterns."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, configs, random_parameters

import refcurv as rc
from refcurv.files.weights import config_from_json, config_to_json
from refcurv.law.checks import ConventionError, NameUnknownError, RangeError, ShapeError
from refcurv.model.config import Image, ModelConfig, RopeScaling
from refcurv.model.patterns import expand, spelled

VIT = Image(channels=1, height=4, width=4, patch=2)
YARN = RopeScaling(kind="yarn", factor=2.0, original=8, slow=1.0, fast=4.0)
LONGROPE = RopeScaling(kind="longrope", original=8, short=(1.0, 1.1), long=(2.0, 3.0))
NO_CLS = Image(channels=1, height=4, width=4, patch=2, specials=())
NAMES = [f"blocks.{i}.{n}" for i in range(12) for n in ("attn.q", "mlp.gate", "mlp.up")] + ["head"]


ANY = st.one_of(configs(), configs(images=True))


@given(ANY)
def test_json_round_trip(made: ModelConfig) -> None:
    again = config_from_json(json.loads(json.dumps(config_to_json(made))))
    assert again == made and hash(again) == hash(made)


@given(ANY)
def test_every_linear_layer_has_a_weight_of_its_shape(made: ModelConfig) -> None:
    shapes = made.parameter_shapes()
    for layer, (d_out, d_in) in made.linear_layers().items():
        assert shapes[made.weight_of(layer)] == (d_out, d_in)
        bias = {(d_out,)} if made.has_bias(layer) else set()
        assert {shapes[name] for name in (f"{layer}.bias",) if name in shapes} == bias
    per_block = 7 if made.gated else 6
    assert len(made.linear_layers()) == per_block * made.layers + 1 + (made.image is not None)
    assert ("head.weight" in shapes) != made.tied


def test_a_file_of_before_these_fields_means_what_it_meant() -> None:
    """Fields that a plain decoder does not need may be missing; the others may not."""
    old = dict(vocabulary=7, width=8, layers=2, heads=4, kv_heads=2, head_width=2, mlp_width=5,
               norm_place="post", qk_norm="full", norm_eps=0.01,
               rope_theta=50.0, tied=False)  # fmt: skip
    made = config_from_json(old)
    assert made.norm == "rms" and made.gated and made.causal and made.biases == ()
    for name in old:
        with pytest.raises(ConventionError, match=f"missing fields .'{name}'"):
            config_from_json({k: v for k, v in old.items() if k != name})


def test_the_rotary_positions_of_each_block() -> None:
    """Its base and scaling; what no block has is not kept, so that equal models are equal."""
    yarn = dict(rope_scaling=YARN, local_theta=9.0)
    made = config(layers=3, rotary=("local", "none", "main"), **yarn)
    assert [made.rope(i) for i in range(3)] == [(9.0, None), None, (100.0, YARN)]
    assert config(rotary=("main", "main"), **yarn) == config(rope_scaling=YARN)
    assert config().rope(1) == (100.0, None) and config(rope_theta=None).rope(0) is None


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
        ("blocks.{0-1}*.mlp.up", 4),
        ("blocks.{01,1-9}.mlp.up", 9),
        ("{,blocks.3.}{mlp.up,he}{ad,}", 2),
        ("blocks.{1-1}1.mlp.{g**,*p}", 2),
        ("bl*.mlp.up", 0),
        ("b**k**1*.*.u*p", 3),
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


def too_long(*_: object) -> None:
    raise AssertionError("it does not end")


@pytest.mark.parametrize("part", ["**x", "*a", "**o", "{0-9999}", "{,**}x", "{*,**}"])
def test_no_pattern_takes_long(part: str) -> None:
    """More ways lead through a name than anybody waits for; no place in it is tried twice."""
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        with pytest.raises(NameUnknownError, match="matches none of"):
            expand(f"{part * 200}!", NAMES)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("pattern", [None, 3, ["head"], b"head"])
def test_a_pattern_is_one_text(pattern: object) -> None:
    """A list of names is a likely guess: the error says how to write it."""
    for refuse in (expand, spelled):
        with pytest.raises(NameUnknownError, match="a pattern is one text, such as"):
            refuse(pattern, NAMES)


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
        ({"learned_positions": -1}, RangeError, "learned_positions must be an integer >= 0"),
        ({"rope_theta": None, "rope_width": 2}, ConventionError, "need a rope_theta"),
        ({"rope_theta": None, "rotary": ("main", "none")}, ConventionError, "need a rope_theta"),
        ({"rotary": ("main",)}, RangeError, "rotary must hold one of .* each block \\(2\\)"),
        ({"rotary": ("main", "global")}, RangeError, "rotary must hold one of .*'local'"),
        ({"rotary": "none"}, RangeError, "rotary must hold"),
        ({"rotary": ("main", "local")}, ConventionError, "needs a local_theta"),
        ({"local_theta": 0.5}, RangeError, "local_theta must be finite and >= 1"),
        ({"rope_scaling": LONGROPE}, ConventionError, "short and long must have 1 numbers each"),
        ({"position_offset": -1}, RangeError, "position_offset must be an integer >= 0"),
        ({"rope_width": 4}, ConventionError, "rope_width at most head_width"),
        ({"rope_width": 1}, ConventionError, "even"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, ConventionError, "all are one"),
        ({"rope_scaling": {"factor": 2}}, ConventionError, "is a RopeScaling or None"),
        ({"biases": ("q", "q")}, ConventionError, "different names"),
        ({"biases": ("w",)}, ConventionError, "biases"),
        ({"biases": "q"}, ConventionError, "different names"),
        ({"biases": ("gate",), "gated": False}, ConventionError, "no gate"),
        ({"biases": ("patch",)}, ConventionError, "for images"),
        ({"windows": (1,)}, RangeError, "each block \\(2\\)"),
        ({"windows": (1, -1)}, RangeError, "each block \\(2\\)"),
        ({"windows": (1, True)}, RangeError, "each block \\(2\\)"),
        ({"windows": (1, 1), "causal": False}, ConventionError, "causal attention"),
        ({"norm_offset": True, "norm_gain": False}, ConventionError, "norm_offset"),
        ({"residual": "shared"}, ConventionError, "stands before"),
        ({"activation": "swish"}, ConventionError, "activation"),
        ({"score_cap": 0.0}, RangeError, "score_cap must be finite and positive"),
        ({"qkv_clip": float("inf")}, RangeError, "qkv_clip"),
        ({"embed_scale": None}, RangeError, "embed_scale must be a number"),
        ({"gated": 1}, ConventionError, "gated must be true or false"),
        ({"pool": "cls"}, ConventionError, "for images"),
        ({"image": 3}, ConventionError, "must be an Image"),
        ({"image": VIT}, ConventionError, "with an image, causal"),
        ({"image": VIT, "causal": False, "pool": "mean", "learned_positions": 3},
         ConventionError, "learned_positions must be 5"),
        ({"image": NO_CLS, "causal": False, "pool": "cls"}, ConventionError, "no such position"),
        ({"norm_eps": -1.0}, RangeError, "norm_eps"),
        ({"norm_eps": float("nan")}, RangeError, "norm_eps"),
        ({"rope_theta": 10**400}, RangeError, "rope_theta must be finite"),
        ({"rope_theta": "10000"}, RangeError, "rope_theta must be a number"),
        ({"norm_place": "posst"}, ConventionError, "Did you mean 'post'"),
        ({"tied": 1}, ConventionError, "tied"),
    ],
)  # fmt: skip
def test_contradictions(change: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        config(**change)


@pytest.mark.parametrize(
    ("record", "change", "says"),
    [
        (RopeScaling, {"kind": "yarn"}, "original must be a positive integer"),
        (RopeScaling, {"kind": "llama3", "original": 9, "slow": 4.0, "fast": 4.0}, "slow must lie"),
        (RopeScaling, {"kind": "linear", "factor": 0.0}, "factor must be finite and positive"),
        (RopeScaling, {"kind": "ntk"}, "kind"),
        (RopeScaling, {"kind": "dynamic"}, "original must be a positive integer"),
        (RopeScaling, {"kind": "longrope", "original": 4}, "longrope, and no other kind, has"),
        (RopeScaling, {"kind": "longrope", "original": 4, "short": (1.0,), "long": ()}, "as many"),
        (RopeScaling, {"kind": "longrope", "original": 4, "short": (1,), "long": (0,)}, "positive"),
        (RopeScaling, {"kind": "longrope", "short": (1,), "long": ("2",)}, "positive"),
        (RopeScaling, {"kind": "longrope", "short": 1, "long": 2}, "as many"),
        (RopeScaling, {"kind": "linear", "short": (1.0,), "long": (1.0,)}, "no other kind"),
        (RopeScaling, {"kind": "linear", "truncate": 1}, "truncate"),
        (Image, {"height": 3}, "multiples of patch"),
        (Image, {"channels": 0}, "channels must be a positive integer"),
        (Image, {"specials": ("distillation",)}, "begin with 'cls'"),
        (Image, {"specials": ("sep",)}, "specials"),
    ],
)
def test_contradictions_inside(record: type, change: dict, says: str) -> None:
    fields = (
        {"factor": 2.0} if record is RopeScaling else dict(channels=1, height=4, width=4, patch=2)
    )
    with pytest.raises((ConventionError, RangeError), match=says):
        record(**(fields | change))


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"width": 3},
        {**config_to_json(config()), "colour": 1},
        {**config_to_json(config()), "image": [2]},
        {**config_to_json(config()), "image": {"channels": 1}},
        {**config_to_json(config()), "rope_scaling": {"kind": "linear", "factor": 2, "mscale": 1}},
    ],
)
def test_foreign_json(data: object) -> None:
    with pytest.raises(ConventionError, match=r"ModelConfig|Image|RopeScaling"):
        config_from_json(data)


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
