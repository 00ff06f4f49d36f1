"""What a cause is called where its fault covers several bugs: the one that was found.

METHOD, Bugs, has one name for each fault. "Another GELU, attention scale, kind of QK-norm or
soft-cap" (B54) is four bugs. A `Setting` says which of them theirs has: its title and remedy are
here, by the field of the setting and its value. What is not here is as the fault says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Final

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.diagnosis.variants import REFERENCE, Setting
from refcurv.judge.diagnosis.variants.networks import CHANGES, Level, Network
from refcurv.judge.diagnosis.variants.norms import NO_EPS
from refcurv.judge.diagnosis.variants.positions import BUT
from refcurv.judge.diagnosis.variants.rotary import ROPES
from refcurv.judge.diagnosis.variants.rounding import CUT
from refcurv.judge.diagnosis.variants.setting import INPUTS, OVERWRITTEN, SWAPPED
from refcurv.judge.diagnosis.variants.shaken import WEIGHTS
from refcurv.judge.diagnosis.variants.sight import sights
from refcurv.judge.diagnosis.variants.texts import LONGER, PROMPT
from refcurv.judge.diagnosis.variants.untrained import GROUPS
from refcurv.law.conventions import Fisher
from refcurv.model.config import Activation, ModelConfig, Residual


@dataclass(frozen=True, slots=True)
class Title:
    """One bug of a fault: its name, and what to change. `{}` in the name is its level."""

    name: str
    remedy: str


_MASK = "Build the mask of each block as the model has it: what is later, other documents and "
_MASK += "padding hidden, and its window."
_PADS = "Hide padding from attention by the attention mask."
_ROPE = "Compute rotary frequencies, angles, cos and sin in float32."
_BASE = "Take the base of the rotary frequencies from the checkpoint's configuration (rope_theta)."
_KIND = "Give each block the rotary positions of its own kind, as the configuration lists them."
_SCALE = "Multiply the scores of attention by the configuration's scale; where it has none, by "
_SCALE += "1/√(width of a head)."
_QK = "Normalise q and k over what the checkpoint's code does: each head, or all heads at once."
_GELU = "Take the activation from the checkpoint's configuration. GELU by erf and GELU by tanh "
_GELU += "are two."
_JOIN = "Let the MLP read what it reads in the checkpoint's code: the stream behind attention, or "
_JOIN += "the input of the block."
_READ = "Load the weights unrounded, or make the reference from the weights as they are loaded."
_SAME = "Load the reference's checkpoint: of the same step, not averaged, without an adapter."

_LOAD = "Load every parameter under its name: ask the loader for the names that it did not find."

NETWORKS: Final[Mapping[str, Title]] = MappingProxyType(
    {
        **{
            f"grouped {one} tiled": Title(
                f"heads of {one} tiled, those of {other} repeated",
                f"Repeat heads of {one} as those of {other}: query head h reads head h div R.",
            )
            for one, other in (("keys", "values"), ("values", "keys"))
        },
        "no causal mask": Title("no causal mask", "Hide from each position what comes later."),
        "documents see each other": Title(
            "documents of a packed sequence see each other",
            "Hide the other documents of a packed sequence by the mask.",
        ),
        "packed as one document": Title(
            "a packed sequence read as one document",
            "Hide the other documents of a packed sequence, and let positions restart with each.",
        ),
        "no windows": Title(
            "no sliding window", "Give each block the window that the configuration gives it."
        ),
        "a window in all blocks": Title(
            "a sliding window of {} in all blocks",
            "Give a window to those blocks alone to which the configuration gives one.",
        ),
        **{one.name: Title(f"another attention mask: {one.name}", _MASK) for one in sights()},
        "padding attended": Title("padding is attended", _PADS),
        "padding attended on the left": Title("padding on the left is attended", _PADS),
        "padding, which sees itself alone, attended on the left": Title(
            "padding on the left is attended", _PADS
        ),
        "rotary base": Title("another rotary base", _BASE),
        "rotary base times": Title("another rotary base, {} times ours", _BASE),
        "no rotary scaling": Title(
            "rotary frequencies that are not scaled",
            "Scale rotary frequencies as the configuration has it (rope_scaling).",
        ),
        "rotary scaling by": Title(
            "rotary frequencies scaled by {}",
            "Scale rotary frequencies by the configuration's factor (rope_scaling).",
        ),
        "no rotary positions": Title(
            "no rotary positions", "Rotate q and k by their positions before the scores."
        ),
        **{name: Title(name, _ROPE) for name in ROPES},
        "rotary positions of texts of length": Title(
            "rotary frequencies scaled for texts of length {}",
            "Scale rotary frequencies by the length of the text that is read.",
        ),
        **{
            f"{kind} rotary positions in all blocks": Title(
                f"{kind} rotary positions in all blocks", _KIND
            )
            for kind in ("main", "local")
        },
        "all of a head is rotary": Title(
            "all of a head is rotary, not a part of it",
            "Rotate the part of each head that the configuration says (partial_rotary_factor).",
        ),
        "positions shifted": Title(
            "learned positions shifted by {}",
            "Read those rows of the table of positions that the checkpoint's code reads.",
        ),
        "positions count padding on the left": Title(
            "positions that count the padding on the left",
            "Count positions from the first token of each text that is no padding.",
        ),
        **{
            f"{part} detached": Title(
                f"gradients that stop at {part_in_words}",
                f"Send gradients back through {part_in_words} too: no detach, stop_gradient or "
                "no_grad there.",
            )
            for part, part_in_words in (
                ("attention weights", "the attention weights"),
                ("norm statistics", "the root mean square of a norm"),
                ("gate", "the gate of an MLP"),
            )
        },
        "eps outside the root": Title(
            "eps outside the root of a norm", "Add eps to the mean square, below the root."
        ),
        "variance over d − 1": Title(
            "the variance of a norm over d − 1", "Divide the variance by d (unbiased=False)."
        ),
        "eps": Title(
            "another eps in the norms",
            "Take eps from the checkpoint's configuration (rms_norm_eps, layer_norm_eps).",
        ),
        "gain and gain − 1": Title(
            "gain taken for 1 + gain, or the other way round",
            "Multiply by the gain, or by 1 + gain, as the checkpoint's code does.",
        ),
        "LayerNorm and RMSNorm": Title(
            "LayerNorm and RMSNorm taken for each other",
            "Take the kind of norm from the checkpoint's code: RMSNorm subtracts no mean.",
        ),
        **{f"activation {name}": Title("another activation", _GELU) for name in Activation},
        **{
            f"residual {name}": Title("attention and MLP joined in another way", _JOIN)
            for name in Residual
        },
        "no score scale": Title("no scale of the attention scores", _SCALE),
        "score scale": Title("another scale of the attention scores", _SCALE),
        "usual score scale": Title(
            "the usual scale of the attention scores, where the model has its own", _SCALE
        ),
        "QK-norm over each head": Title("QK-norm over each head, not over all", _QK),
        "QK-norm over all heads": Title("QK-norm over all heads, not over each", _QK),
        "no QK-norm": Title("no QK-norm", "Normalise q and k before the scores."),
        "no soft-cap of scores": Title(
            "no soft-cap of the attention scores",
            "Cap the scores as the configuration has it (attn_logit_softcapping).",
        ),
        "no soft-cap of logits": Title(
            "no soft-cap of the logits",
            "Cap the logits as the configuration has it (final_logit_softcapping).",
        ),
        "no soft-cap in the backward": Title(
            "a soft-cap of the logits that the backward leaves out",
            "Send gradients back through the soft-cap: its slope is 1 − tanh².",
        ),
        "no clip of q, k and v": Title(
            "q, k and v that are not clipped", "Clip q, k and v as the configuration has it."
        ),
        "no embedding scale": Title(
            "embeddings that are not scaled",
            "Multiply the embeddings by the factor of the checkpoint's code, in Gemma √width.",
        ),
        "embedding scale": Title(
            "another scale of the embeddings, {}",
            "Multiply the embeddings by the factor of the checkpoint's code, once.",
        ),
        "logit scale": Title(
            "logits times {} before the softmax",
            "Take the loss of the logits as the model defines them: at temperature 1, and scaled "
            "once where the configuration scales them.",
        ),
        "embedding scale in bfloat16": Title(
            "a factor of the embeddings that is rounded to bfloat16",
            "Multiply the embeddings by their factor as it is in float32.",
        ),
        **{
            f"weights as {dtype}": Title(f"weights rounded to {dtype}", _READ)
            for dtype in ("bfloat16", "float16")
        },
        f"weights as {CUT}": Title("weights cut to bfloat16, not rounded", _READ),
        **{f"other weights of {some}": Title("another checkpoint", _SAME) for some in WEIGHTS},
        **{group: Title(f"parameters that were not loaded: {group}", _LOAD) for group in GROUPS},
        "head is the embedding": Title(
            "a head that is the embedding, where it has weights of its own", _LOAD
        ),
        "weights to bits": Title("weights rounded to {} bits", _READ),
        "matrices to bits": Title("matrices rounded to {} bits", _READ),
        **{
            f"integers by {scale}": Title("matrices rounded to integers of {} bits", _READ)
            for scale in ("row", "matrix")
        },
        **{
            f"{part} in {dtype}": Title(
                f"{part} in {dtype}", f"Compute the {part} in float32, or declare {dtype}."
            )
            for part in ("norms", "attention")
            for dtype in ("bfloat16", "float16")
        },
        **{
            f"autocast in {dtype}": Title(
                f"a model under autocast to {dtype}",
                f"Run the model without autocast, or declare it: --arithmetic model={dtype}.",
            )
            for dtype in ("bfloat16", "float16")
        },
        "all in float16": Title(
            "model in float16", "Run the model in float32, or declare that it is float16."
        ),
    }
)
"""By the name of a change (`networks.CHANGES`), without its draw. Not here is what its fault names
alone: interleaved pairs, tiled groups, dropout, TF32 and a model in bfloat16."""

_PLACES = "Hook the linear layer itself, and take its input."
_GRADIENTS = "Hook the linear layer itself, and take the gradient at its output."
_DRAW = "Draw labels where the corpus has one; no other position has a loss."
_OTHER = "Choose rows by one rule for a, for g and for the count: the reference's (ROWS)."
_DATA = "Send back the labels of the data, or make the reference with the Fisher of the model."
_TEXT = "Give the model the tokens of the corpus, no more and no fewer."
_SUMS = "Write x = x + y in the place of x += y, or copy what the hook receives."

FIELDS: Final[Mapping[tuple[str, Any], Title]] = MappingProxyType(
    {
        ("labels", "sampled"): Title("labels of the model in the place of the data's", _DATA),
        ("labels", "expected"): Title("labels of the model in the place of the data's", _DATA),
        ("labels", "tempered"): Title(
            "labels drawn with a temperature", "Draw from the plain softmax, at temperature 1."
        ),
        ("labels", "nucleus"): Title(
            "labels drawn without the tail of the softmax", "Draw from all of the vocabulary."
        ),
        ("labels", "drawn, then shifted"): Title(
            "labels that were drawn, and shifted then",
            "What is drawn at a position is the label of that position: do not shift it.",
        ),
        ("where", "prompts"): Title("labels drawn at the prompt too", _DRAW),
        ("where", "last"): Title("labels drawn at the last position too", _DRAW),
        ("where", "everywhere"): Title("labels drawn at every position", _DRAW),
        ("where", "ignored last"): Title(
            "a label at the last position: what follows the text",
            "Give the last position of each text no label: ignore_index.",
        ),
        ("rows_A", "without last"): Title("the last position left out of the rows", _OTHER),
        ("rows_A", "without the last column"): Title("the last column is no row", _OTHER),
        ("rows_A", "without first, with last"): Title("rows that are one position late", _OTHER),
        ("rows_A", "with prompts"): Title("prompt positions counted as rows", _OTHER),
        ("rows_A", "without prompts"): Title("prompt positions left out of the rows", _OTHER),
        ("rows_A", "without first"): Title("the first position left out of the rows", _OTHER),
        ("rows_A", "first twice"): Title("the first position counted twice", _OTHER),
        ("rows_A", "as if padding were on the right"): Title(
            "padding looked for on the right, where it is on the left", _OTHER
        ),
        ("rows_A", "as if padding were on the left"): Title(
            "padding looked for on the left, where it is on the right", _OTHER
        ),
        ("rows_A", BUT): Title("other positions are rows", _OTHER),
        ("text", "no start token"): Title("texts without their start token", _TEXT),
        ("text", LONGER): Title("texts with one start token more", _TEXT),
        ("text", PROMPT): Title("texts with tokens that the corpus has not", _TEXT),
        ("count", "positions"): Title(
            "divided by all positions, padding among them", FAULTS["B4"].remedy
        ),
        **{
            ("tensor_A", name): Title("another tensor taken for the layer's input", _PLACES)
            for name in INPUTS
        },
        ("tensor_A", "norm's input"): Title("the input taken before the norm", _PLACES),
        ("tensor_A", "norm without gain"): Title(
            "the input without the gain of the norm before it",
            "Take the input of a model whose norms keep their gains: where these are folded into "
            "the weights behind them (fold_ln), A is of another W.",
        ),
        **{("tensor_A", name): Title("a sum computed in place", _SUMS) for name in OVERWRITTEN},
        ("tensor_G", "input"): Title("G at the input of the layer", _GRADIENTS),
        ("tensor_G", "shared input"): Title(
            "G at the input of the layer and of its neighbours", _GRADIENTS
        ),
        ("tensor_G", "stream"): Title("G at the stream before the layer", _GRADIENTS),
        ("tensor_G", "activation"): Title("G behind the activation", _GRADIENTS),
        ("tensor_G", "update"): Title("G behind the norm that follows the layer", _GRADIENTS),
    }
)  # fmt: skip
"""By the field of a `Setting` and its value, or what its value begins with. rows_G is as rows_A."""

_LIKELIEST = Title("the likeliest label in the place of the data's", _DATA)
_SMOOTHED = Title("smoothed labels", "Set label_smoothing to 0.")
_Z_LOSS = Title("a z-loss beside the cross-entropy", "Leave the z-loss out of the loss.")
_PART = Title(
    "G of another part of a matrix that holds several layers",
    "Split such a matrix in the order in which the program joins its parts (q, k and v; gate and "
    "up), and store each part by its own name.",
)
_OTHER_A = Title("the input of another layer", f"{_PLACES} Look up the name by which it is stored.")
_OTHER_G = Title(
    "the gradient of another layer", f"{_GRADIENTS} Look up the name by which it is stored."
)
ANOTHER: Final[Mapping[tuple[str, str], Title]] = MappingProxyType(
    {("B34", "A"): _OTHER_A, ("B34", "G"): _PART, ("B35", "G"): _OTHER_G}
)
"""By fault and side, of what is ours of another layer (`others`)."""


def titles(
    case: Case | None, fault: str, setting: Setting | None, side: str, note: str
) -> tuple[Title, ...]:
    """The bugs of this fault that a setting has, or one that is another matrix of ours.

    Args: case, None where its own numbers and its program say nothing.

    Proof: tests/test_judge_titles.py::test_a_cause_is_called_by_the_bug_that_was_found
    """
    own = as_named(fault, case.dump.program if case else "")
    if setting is None:
        other = ANOTHER.get((fault, side)) if note.startswith("it is our ") else None
        return (other or own,)
    found = [one or own for of, one in _titles(case, setting) if of == fault]
    return tuple(dict.fromkeys(found)) or (own,)


def as_named(fault: str, program: str) -> Title:
    """The fault itself, with the advice for a program."""
    return Title(FAULTS[fault].name, FAULTS[fault].advice(program))


def of_size(fault: str, words: str, program: str) -> Title:
    """Of what has the size of a dtype: float16 has as many digits as TF32 (B60).

    Args: words, what is said of the size.
    """
    own = as_named(fault, program)
    if words.startswith("A network under autocast"):
        return NETWORKS[f"autocast in {words.partition(' to ')[2].partition(' ')[0]}"]
    if fault != "B60":
        return own
    if words.startswith("A network in float16"):
        return NETWORKS["all in float16"]
    return Title("TF32 products, or a model in float16", f"{own.remedy} Or declare float16.")


FACTORS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "B4": MappingProxyType({
            "these are sums": "sums that are not divided",
            "": "divided by another count than that of the rows",
        }),
        "B5": MappingProxyType({
            "twice": "curvature counted twice", "half": "half of the curvature",
        }),
    }
)  # fmt: skip
"""By fault and what is said of the factor: the bug that it is."""


def of_factor(fault: str, words: str, program: str) -> Title:
    """Of a constant factor (`scales`). Args: words, what is said of it."""
    own = as_named(fault, program)
    names = (name for part, name in FACTORS.get(fault, {}).items() if part in words)
    return replace(own, name=next(names, own.name))


def _titles(case: Case | None, setting: Setting) -> Iterator[tuple[str, Title | None]]:
    """Each part of a setting: its fault, and its title, None where it is as the fault says."""
    for name in (f.name for f in fields(Setting)):
        value = getattr(setting, name)
        if name != "network" and value != getattr(REFERENCE, name):
            for fault in replace(REFERENCE, **{name: value}).faults:
                yield fault, _of_field(case, name, value)
    for level in setting.network:
        yield CHANGES[level[0]].fault, of_change(level, case)


def _of_field(case: Case | None, name: str, value: Any) -> Title | None:
    if name in ("smoothing", "z_loss"):
        return _SMOOTHED if name == "smoothing" else _Z_LOSS
    if value == "argmax" and case and case.reference.fisher is Fisher.EMPIRICAL:
        return _LIKELIEST
    if value in SWAPPED:
        return ANOTHER[Setting(tensor_G=value).faults[0], "G"]
    key = "rows_A" if name == "rows_G" else name
    first = next((x for x in (BUT, LONGER, PROMPT) if str(value).startswith(x)), value)
    return FIELDS.get((key, first))


def of_change(level: Level, case: Case | None) -> Title | None:
    """That of a change of the network, with what of the configuration it changes."""
    name, size = level
    one = NETWORKS.get(name.partition(", draw ")[0])
    if one is None:
        return None
    beside = [] if case is None or case.model is None else _beside(level, case.model.config)
    text = ": ".join(filter(None, (one.name.format(f"{size:g}"), ", ".join(beside))))
    return replace(one, name=text)


def _beside(level: Level, config: ModelConfig) -> list[str]:
    """Their number, or their choice, beside ours: "norm_eps 1e-06, ours 1e-05"."""
    name, size = level
    change = CHANGES[name]
    if change.fault not in ("B26", "B51", "B53", "B54") or change.reshaped or "float16" in name:
        return []
    made = change.make(Network(config, {}), size).config
    out = []
    for field in (f.name for f in fields(ModelConfig)):
        theirs, ours = getattr(made, field), getattr(config, field)
        if field == "score_scale":
            theirs, ours = (config.head_width**-0.5 if x is None else x for x in (theirs, ours))
        if theirs != ours and all(x is None or isinstance(x, _PLAIN) for x in (theirs, ours)):
            out.append(f"{field} {_said(theirs)}, ours {_said(ours)}")
    return out


_PLAIN = (bool, int, float, str)


def _said(value: object) -> str:
    if value == NO_EPS:
        return "0"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    return "none" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def joined(titles: tuple[Title, ...]) -> Title:
    """One of several: bugs of one fault that theirs has at once."""
    remedies = dict.fromkeys(one.remedy for one in titles)
    return Title("; ".join(dict.fromkeys(one.name for one in titles)), " ".join(remedies))
