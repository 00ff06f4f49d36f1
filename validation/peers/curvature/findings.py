"""What did not come out equal in the peers themselves, each traced by a minimal reproduction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object.pspace import PMatKFAC
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import refcurv as rc
from refcurv.algebra.scaling import norm
from refcurv.model.part import part_of

from . import official_edit
from .finding import Finding
from .judged import judged_as
from .programs import bergson, curvlinops, official
from .programs import kfac_jax as jax_program
from .subject import Subject

WHERE = "findings"


def apart(one: np.ndarray, two: np.ndarray) -> float:
    """|one − two| over |two|."""
    return float(norm(one - two) / norm(two))


def type_2_mixes(subject: Subject) -> Finding:
    """curvlinops' type-2 against the expectation."""
    theirs = curvlinops.gradients(subject, fisher_type="type-2")
    every = ",".join(subject.names)
    ours = rc.collect(subject.model, subject.corpus, every, "expected", rows="all")
    off = {layer: apart(theirs[name], ours[layer].G) for layer, name in subject.names.items()}
    alike = [layer for layer, error in off.items() if error < 1e-13]
    last = subject.model.config.layers - 1
    parts = ("attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    own = [f"blocks.{last}.{part}" for part in parts]
    worst = max(off, key=lambda layer: off[layer])
    text = (
        "Type-2 sends one column of the loss's root back from all positions at once (O13). G "
        "agrees with the expectation where a layer feeds its own position alone "
        f"({', '.join(alike)}), and is off by up to {off[worst]:.0%} ({worst}) elsewhere. Its MC "
        "mode is right (the second table). Use FisherType.MC on models that mix positions."
    )
    return Finding("curvlinops", "B18", text, alike == [*own, "head"], f"{WHERE}.type_2_mixes")


def rows_without_gradient(subject: Subject) -> Finding:
    """kfac-jax's masks, on by default, take a row for padding when its g is 0."""
    theirs = jax_program.estimated(subject, "float64", "fisher_empirical", masked=True)
    every = ",".join(subject.names)
    ours = rc.collect(subject.model, subject.corpus, every, "empirical")
    short = [layer for layer, name in subject.names.items() if theirs[name][2] != ours[layer].n_A]
    queries = [layer for layer in subject.names if layer.endswith(".q")]
    others = max(
        apart(theirs[name][0], ours[layer].A)
        for layer, name in subject.names.items()
        if layer not in short
    )
    layer = queries[0]
    A, _, n = theirs[subject.names[layer]]
    text = (
        "By default a repeated dense layer takes a row whose gradient is 0 for padding. Of the "
        "last position, which has no label, that gives our `reached` rows. But the query of "
        "position 0 has gradient 0 as well (O31: one key), so that it drops a real row of each "
        f"sequence from A of every query layer: {n} rows for {ours[layer].n_A}, A of {layer} off "
        f"by {apart(A, ours[layer].A):.1%}; the other layers agree to {others:.0e}. "
        "use_masking=False keeps all rows."
    )
    holds = short == queries and n == ours[layer].n_A - len(subject.tokens) and others < 1e-13
    return Finding("kfac-jax", "B30", text, holds, f"{WHERE}.rows_without_gradient")


def one_of_masked_rows() -> Finding:
    """kfac-jax appends the 1 of a bias at masked positions too."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 3, 4)), {"W": rng.normal(size=(4, 5)), "b": np.zeros(5)}

    def loss(weights: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, labels = batch
        y = x @ weights["W"] + weights["b"]
        y = kfac_jax.register_dense(y, x, weights["W"], weights["b"], variant="repeated_dense")
        kfac_jax.register_softmax_cross_entropy_loss(y[:, :-1], targets=labels)
        return y.sum()

    batch = jnp.asarray(x), jnp.asarray(rng.integers(0, 5, (2, 2)))
    weights = {name: jnp.asarray(value) for name, value in weights.items()}
    (state,) = jax_program.updated(loss, weights, [batch], "fisher_empirical", 0).values()
    corner = float(state.factors[0].value[-1, -1] / state.average_repeats.value)
    text = (
        "With a bias, a masked row is zeroed before the column of ones is appended: of three "
        f"positions of which one is masked, the corner of A is {corner:g}, and should be 1."
    )
    return Finding("kfac-jax", "B30", text, corner == 1.5, f"{WHERE}.one_of_masked_rows")


def exact_mode_of_sequences() -> Finding:
    """kfac-jax's root of a categorical's Fisher, column by column, with and without positions."""
    jax.config.update("jax_enable_x64", True)

    def off(positions: int) -> float:
        logits = np.random.default_rng(0).normal(size=(1, positions, 5))
        loss = kfac_jax.CategoricalLogitsNegativeLogProbLoss(jnp.asarray(logits))
        one_hot = loss.multiply_fisher_factor_replicated_one_hot
        columns = [np.ravel(one_hot(at)[0]) for at in np.ndindex(positions, 5)]
        F = sum(np.outer(column, column) for column in columns)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        true = np.zeros_like(F)
        for t, p_V in enumerate(p[0]):
            at = slice(5 * t, 5 * t + 5)
            true[at, at] = np.diag(p_V) - np.outer(p_V, p_V)
        return apart(F, true)

    alone, two = off(1), off(2)
    text = (
        "`fisher_exact` and `ggn_exact` are wrong for logits with a position axis: the column of "
        "one position and class, √p (e − p), subtracts p at *every* position. Σ S Sᵀ of one "
        f"position agrees with diag p − p pᵀ to {alone:.0e}, of two positions it is off by "
        f"{two:.0%}. Its sampled and sign modes are right (the second table)."
    )
    return Finding(
        "kfac-jax", "", text, alone < 1e-14 and two > 0.1, f"{WHERE}.exact_mode_of_sequences"
    )


def unequal_batches(subject: Subject) -> Finding:
    """The official scale is of a batch: one that is not full counts more."""
    sizes, layer = (4, 2), "blocks.1.mlp.up"
    theirs = official.collected(subject, "float64", sizes)["blk1.up"]
    at, want, parts = 0, 0.0, []
    for size in sizes:
        part = part_of(subject.corpus, slice(at, at + size))
        one = rc.collect(subject.model, part, layer, "empirical")[layer]
        want = want + one.sum_G / one.n_A**2
        parts.append(one.n_A)
        at += size
    whole = rc.collect(subject.model, subject.corpus, layer, "empirical")[layer]
    G = theirs["G"].numpy()
    shape = apart(G / np.trace(G), whole.G / np.trace(whole.G))
    error = apart(theirs["n_tokens"] * G, want)
    text = (
        f"G of a mean loss is 1/m² of ours batch by batch. With batches of {parts[0]} and "
        f"{parts[1]} positions no one factor repairs it: G/tr G is off by {shape:.1%}, and "
        f"Σ_b S_G(b)/m_b² is what it holds, to {error:.0e}. Its file does not record m."
    )
    holds = error < 1e-13 < shape
    return Finding("official", "B2", text, holds, f"{WHERE}.unequal_batches")


def casts(subject: Subject) -> Finding:
    """What transformers' own float32 does to a run that says float64."""
    found = official.found(subject, "float64", subject.folder.parent, patched=False)
    verdict = judged_as(subject, found, "float64")
    worst = max(f.error for f in verdict.findings if f.quantity == "G/tr G" and f.error is not None)
    text = (
        "transformers computes norms, softmax and rotary tables in float32 in a float64 model. A "
        f"dump of such a run that declares float64 does not pass: G/tr G is off by up to "
        f"{worst:.0e}. The table's float64 rows undo these casts."
    )
    holds = not verdict.passed and 1e-10 < worst < 1e-5
    return Finding("transformers", "", text, holds, f"{WHERE}.casts")


def refuses_positions(subject: Subject) -> Finding:
    """nngeometry's nn.Linear takes matrices alone."""
    linear = torch.nn.Linear(3, 2, bias=False)
    x = torch.randn(4, 5, 3)
    data = DataLoader(TensorDataset(x), batch_size=2)
    layers = LayerCollection.from_model(model := torch.nn.Sequential(linear))
    backend = TorchHooksJacobianBackend(
        model, lambda x: model(x).sum((1, 2))[:, None], layer_collection=layers
    )
    try:
        PMatKFAC(backend, examples=data)
        said = ""
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    text = (
        f"An nn.Linear that sees (batch, position, width) fails (“{said}”). The table's rows wrap "
        "each layer, so that it sees positions as rows. So its Λ squares the gradient of each "
        "position by itself: it is Λ per token, the others' is per sequence."
    )
    return Finding("nngeometry", "", text, bool(said), f"{WHERE}.refuses_positions")


def head_left_out(subject: Subject) -> Finding:
    """bergson hooks the model below its head."""
    left = set(subject.names.values()) - set(
        bergson.found(subject, "float32", subject.folder.parent / "head").layers
    )
    text = (
        f"Factors of {len(subject.names) - len(left)} of {len(subject.names)} layers: it hooks "
        f"`base_model`, so that {', '.join(left)} has none. Sampled labels are masked where the "
        "dataset has no label: B19 is mended in this version."
    )
    return Finding("bergson", "", text, left == {"lm_head"}, f"{WHERE}.head_left_out")


def of_a_document(subject: Subject) -> Finding:
    """bergson's eigenvalues carry the positions of a document."""
    files = bergson.fitted(subject, "float64", subject.folder.parent / "document")
    A = load_file(files / "activation_sharded" / "shard_0.safetensors")
    mu = load_file(files / "factor_eig_a" / "shard_0.safetensors")
    n, documents = subject.labels.numel(), len(subject.tokens)
    ratios = {float(mu[name].sum() / (A[name].trace() / n)) for name in A}
    want = (n / documents) ** 0.5
    error = max(abs(ratio / want - 1) for ratio in ratios)
    text = (
        "`factor_eig_a` and `factor_eig_g` are the eigenvalues of A and G times the root of "
        f"positions ÷ documents (here √({n}/{documents}), to {error:.0e}), and "
        "`eigenvalue_correction_sharded` is Λ as a mean over documents. Version 3c66bb5 stored "
        "the root of positions, and a sum. No file says how many documents there were: the ratio "
        "of the traces does."
    )
    return Finding("bergson", "B10", text, error < 1e-13, f"{WHERE}.of_a_document")


def findings(subject: Subject) -> list[Finding]:
    """All of them."""
    return [
        type_2_mixes(subject),
        rows_without_gradient(subject),
        one_of_masked_rows(),
        exact_mode_of_sequences(),
        unequal_batches(subject),
        casts(subject),
        refuses_positions(subject),
        head_left_out(subject),
        of_a_document(subject),
        *official_edit.findings(),
    ]
