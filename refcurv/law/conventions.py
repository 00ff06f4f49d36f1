"""The law: every ambiguity that makes two right programs disagree, decided here by name.

`LAW` holds the sentences, and the functions that carry them out. The constants and enums below are
their executable form. Errors quote the names. Every file records the sentences (`describe`). The
README prints them, and a test holds that table equal to `LAW`.

Axis letters, used as suffixes of local arrays in `model/` and `passes/`: see `AXES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

AXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "B": "sequence of a batch",
        "T": "position (query)",
        "S": "position (key)",
        "N": "row: one kept position",
        "D": "model width",
        "I": "input width of a linear layer (d_in)",
        "O": "output width of a linear layer (d_out)",
        "H": "query head",
        "K": "key-value head",
        "R": "query heads per key-value head",
        "E": "head width",
        "V": "vocabulary",
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """One article of the law.

    Fields: sentences, one idea each; where, the functions that carry it out, as "module:name".
    """

    sentences: tuple[str, ...]
    where: tuple[str, ...]

    @property
    def text(self) -> str:
        """The sentences in one line."""
        return " ".join(self.sentences)


def _decision(where: str, *sentences: str) -> Decision:
    """A Decision; `where` names places below `refcurv`, separated by spaces."""
    return Decision(sentences, tuple(f"refcurv.{place}" for place in where.split()))


LAW: Final[Mapping[str, Decision]] = MappingProxyType(
    {
        "ORIENTATION": _decision(
            "model.transformer:linear_forward files.huggingface:convert",
            "W has the shape (d_out, d_in).",
            "A layer computes y = x Wᵀ of rows x.",
            "A checkpoint that stores W the other way is turned at conversion.",
        ),
        "VEC, KRON": _decision(
            "algebra.kron:rvec algebra.kron:kron_dense algebra.kron:kron_apply",
            "Matrices become vectors row by row: rvec(W)[o·I + i] = W[o, i].",
            "The block of a layer is G ⊗ A, in this order.",
            "So (G ⊗ A) rvec(X) = rvec(G X A).",
        ),
        "LOSS": _decision(
            "model.loss:cross_entropy",
            "The loss is the sum of nats over the labelled positions, never their mean.",
            "g is the gradient of that sum with respect to a layer's output.",
        ),
        "COUNTS": _decision(
            "curvature.definition:factors curvature.accumulate:ShardSums curvature.factors:Factor",
            "Sums and counts are stored: S_A = Σ a aᵀ, n_A, S_G = Σ g gᵀ and n_G.",
            "a is the input of a kept row, g its output gradient.",
            "n_A is the number of rows.",
            "n_G is the number of rows times the number of draws.",
            "A = S_A / n_A, G = S_G / n_G and K = n_A (G ⊗ A).",
            "G ⊗ A approximates the curvature of the mean loss per row.",
        ),
        "BIAS": _decision(
            "curvature.factors:Factor.A_joint curvature.bases:decompose",
            "A bias is either a block of its own or a column of its layer's matrix.",
            "`separate` (default): W has K = n_A (G ⊗ A), as if there were no bias.",
            "The bias has K = n_A G, because its input is 1.",
            "`joint`: weight and bias are one matrix [W b], b its last column.",
            "The input of [W b] is [a; 1].",
            "Its A is [[S_A, Σ a], [Σ aᵀ, n_A]] / n_A, whose corner is exactly 1.",
        ),
        "EMBEDDING": _decision(
            "model.transformer:input_taps model.config:ModelConfig.tables",
            "A table of tokens or positions has the shape (V, D), one row for each entry.",
            "It counts as the transpose of a linear layer that reads one-hot vectors.",
            "So S_A is diagonal: how often the kept rows read each entry.",
            "Only the diagonal is stored, (V,).",
            "g is the gradient with respect to the stored entry, so embed_scale is a factor of it.",
            "A tied table has two uses, `embed` and `head`.",
            "Each use has the factors that it would have without the other.",
            "The shared matrix has F = F_embed + F_head + C + Cᵀ, C the cross terms of the uses.",
            "The shared matrix has no K.",
        ),
        "VECTOR": _decision(
            "curvature.blocks:collect_blocks",
            "A gain, a bias and a special position of images have no Kronecker form.",
            "The block of such a vector is F = Σ D Dᵀ over segments.",
            "D is the gradient of the vector, summed over the positions of the segment.",
            "For `expected` the sum is also over loss positions and vocabulary entries.",
            "A segment is a document of a packed sequence, any other sequence, or an image.",
            "No position reaches a position of another segment.",
            "So packing and padding change no F, whether of vectors or of matrices.",
        ),
        "LABELS": _decision(
            "model.labels:shift_labels model.labels:require_labels",
            "labels[b, t] is what position t of sequence b should predict.",
            "A negative label means none.",
            "The default label of a causal model is the next token of the same segment.",
            "So the last position of a segment has no default label.",
            "Bidirectional models and images have no default.",
            "An image has one label, its class.",
        ),
        "ROWS": _decision(
            "model.rows:kept model.rows:reached model.rows:require_rows",
            "Rows are the positions that enter A and G.",
            "Padding is never a row.",
            "`reached` (default): the positions from which a label is reached.",
            "In a causal model: those at or before the last labelled position of their segment.",
            "In a bidirectional model they are all positions of a segment that has a label.",
            "Of images they are all positions of an image that has a label.",
            "`labelled`: the positions that have a label; images cannot choose it.",
            "`all`: every real position; of images the same as `reached`.",
            "`cls`: the first position of each image that has a label; tokens cannot choose it.",
            "A head that reads images pooled has one row for each label.",
            "The `patch` layer has one row for each patch; special positions are not rows of it.",
        ),
        "FISHER": _decision(
            "model.fisher:cotangents",
            "FISHER says whose labels the backward passes use.",
            "Only positions where the corpus has a label send anything back.",
            "p are the probabilities of the model at a position, and S = diag(√p) − p √pᵀ.",
            "S is a root of the Hessian of the loss by the logits: S Sᵀ = diag p − p pᵀ.",
            "`expected`: the exact mean over all labels that the model could draw.",
            "For each loss position and vocabulary entry v one backward pass sends column v of S.",
            "`signed`: an unbiased estimate of `expected` that draws signs instead of labels.",
            "It takes one backward pass for each segment and draw, which sends back S ε from all "
            "positions jointly, ε ∈ {±1}^V at each of them.",
            "`sampled`: labels are drawn from the model.",
            "It takes one backward pass for each segment and draw, all positions jointly.",
            "`empirical`: the labels are the corpus's.",
            "It takes one backward pass for each segment, all positions jointly.",
        ),
        "SAMPLING": _decision(
            "model.sampling:uniforms model.sampling:draw_labels model.sampling:signs",
            "The generator is Philox4x64-10 with the key (seed, 0).",
            "A block is its output at one counter, four 64-bit words numbered from 0.",
            "The corpus index numbers the sequences or images of the corpus from 0.",
            "The uniform u of position t is made of word t mod 4 of the block at counter "
            "(1 + t div 4, 0, draw, corpus index).",
            "u is the top 53 bits of that word times 2⁻⁵³.",
            "For a label, c is the sequential float64 cumsum of exp(z − max z) over the logits z.",
            "The label is the first v with c_v > u·c_{V−1}.",
            "If there is none, it is the last v with exp(z_v − max z) > 0.",
            "The sign of entry v at position t is bit v mod 64 of word n = v div 64, bit 0 the "
            "least significant.",
            "Word n is word n mod 4 of the block at (1 + n div 4, 1 + t, draw, corpus index).",
            "A bit of 1 means +1, a bit of 0 means −1.",
            "For an image t = 0.",
        ),
        "THREE": _decision(
            "curvature.exact.fishers:fisher curvature.exact.fishers:f_tok "
            "curvature.exact.fishers:kfac",
            "F, F_tok and K are three matrices, never one.",
            "F is the exact block.",
            "F_tok is F without the terms between two positions.",
            "K is n_A (G ⊗ A), as in COUNTS.",
        ),
        "ESTIMATOR": _decision(
            "curvature.estimators:reduce curvature.estimators:ekfac",
            "`expand` (default): A and G sum over single rows.",
            "`reduce`: each segment is one row, its a the mean and its g the sum of its rows'.",
            "n_A then counts segments.",
            "EK-FAC puts Λ (O, I) in the place of n_A λ μᵀ, in the eigenbases u_i, v_j of G, A.",
            "Per `token` Λ_ij is the sum of (u_i·g)² (v_j·a)² over rows: the diagonal of F_tok.",
            "Per `sequence` Λ_ij sums (Σ u_i·g v_j·a)² over segments: the diagonal of F.",
            "Λ is stored as a sum over draws, and divided by their number once.",
        ),
        "ORDER": _decision(
            "curvature.eigenbasis:eigenbasis curvature.eigenbasis:oriented",
            "Eigenvalues descend.",
            "Eigenvectors are columns.",
            "The entry of largest magnitude of each eigenvector is positive.",
            "If several entries have that magnitude, the one of lowest index counts.",
        ),
        "NEGATIVE": _decision(
            "curvature.eigenbasis:eigenbasis law.tolerance:negative law.tolerance:underflow "
            "passes.rounding:rounding",
            "Rounding can make an eigenvalue of a (d, d) factor negative.",
            "It reaches −b at most, where b = λ_max·c·(n_shard·eps(compute) + d·eps(float64)) + "
            "d·n_shard·(the smallest positive number of compute).",
            "Here λ_max is the largest eigenvalue, c = 4, n_shard the most rows of one shard and "
            "compute the dtype of the products.",
            "An eigenvalue from −b to 0 becomes 0; those below 0 are counted.",
            "An eigenvalue below −b is an error.",
            "A layer is not edited if rounding makes more than 1/64 of tr S_G.",
        ),
        "SELECT": _decision(
            "algebra.selection:select algebra.staircase:cut",
            "Powers of two first bring the largest entry of λ, and that of μ, into [1, 2).",
            "The key of pair (i, j) is fl(λ_i μ_j), the product rounded to float64.",
            "Pairs are ordered by descending key, equal keys by i and then by j.",
            "The first pairs always form a staircase: row i holds its first c_i pairs.",
            "fsum is the correctly rounded sum.",
            "A staircase has the mass fsum_i fl(λ_i·P[c_i]), P[c] the fsum of the first c of μ.",
            "The target is fl(fl(ρ·fsum(λ))·fsum(μ)).",
            "The fewest first pairs whose mass is the target or more are kept.",
            "If rounding leaves the mass of all pairs below the target, all are kept.",
            "ρ = 1 keeps everything and returns W itself.",
            "ρ = 0 keeps nothing.",
        ),
        "ACCEPTABLE": _decision(
            "algebra.staircase:undecided law.tolerance:eigenvalues",
            "A pair is acceptable if another correct solver may decide it the other way.",
            "Of one G two correct solvers differ by at most e_G = (16·O + 2)·eps·‖λ‖₂, in 2-norm "
            "over all eigenvalues.",
            "Of one A they differ by at most e_A = (16·I + 2)·eps·‖μ‖₂.",
            "So a key lies between (λ_i − e_G)₊(μ_j − e_A)₊, its least, and "
            "(λ_i + e_G)(μ_j + e_A), its greatest.",
            "The mass of a set, less the target, moves by at most s and the rounding of SELECT.",
            "s = max(ρ, 1 − ρ)·(√I·Σλ·e_A + √O·Σμ·e_G + √(O·I)·e_A·e_G).",
            "Others may come before pair p if their greatest key is p's least key or more.",
            "p is surely kept if the mass of these others is less than the target − s.",
            "The pairs that must come before p are those of a least key above p's greatest key.",
            "p is surely dropped if the mass of these is the target + s or more.",
            "`acceptable` counts the pairs that are neither.",
            "It is 0 at ρ = 0 and at ρ = 1.",
            "For singular values the key is σ² and e = (16·max(O, I) + 2)·eps·‖σ‖₂.",
        ),
        "PRECISION": _decision(
            "files.weights:widen curvature.accumulate:add_gram curvature.moments:RunningSum "
            "editing.record:rounded",
            "Reading widens stored numbers exactly.",
            "The passes compute in one dtype, float64 or by choice float32.",
            "The products of one backward pass over a shard are in that dtype.",
            "They are in float64 where all of float32's would vanish.",
            "The sums over passes and shards, eigensolvers, factors and bases are in float64.",
            "By choice the eigenvectors of a basis are rounded to float32, once.",
            "Edited weights have the dtype of their source.",
        ),
        "SHARD, BLOCK": _decision(
            "passes.shards:shards law.conventions:shard_sequences curvature.accumulate:accumulate",
            "A shard is max(1, 512 div T) consecutive sequences.",
            "T is the width of the corpus, for images the number of the model's positions.",
            "The head works on 512 kept rows at a time.",
            "A block is 256 consecutive shards.",
            "A shard's backward passes are ordered by draw, for `expected` by position and entry.",
            "They are added in this order to a shard sum that starts from zero.",
            "Shard sums are added in order to a block sum that starts from zero.",
            "Block sums are added in order to the total.",
        ),
        "FINGERPRINT": _decision(
            "curvature.factors:fingerprint curvature.checkpoint:Checkpoint",
            "A run goes on only from what a run left that had the same of all these.",
            "The inputs: the files of weights and corpus, or of factors, by SHA-256.",
            "The choices: layers, fisher, seed, draws, rows, halves and dtype; or bias and dtype.",
            "This law, and the versions of refcurv, Python, NumPy, SciPy, Numba and h5py.",
            "The machine: the BLAS kernels, the CPU's features and how the kernels are compiled.",
            "A refusal names what differs.",
        ),
    }
)

NO_LABEL: Final = -1
"""LABELS: the label of a position that predicts nothing (any negative number is read so)."""

SHARD_TOKENS: Final = 512
"""SHARD: positions in one unit of computation."""

HEAD_ROWS: Final = 512
"""SHARD: rows whose logits exist at one time."""

BLOCK_SHARDS: Final = 256
"""BLOCK: shards whose sums are added before they join the total."""

WORD_BITS_KEPT: Final = 53
"""SAMPLING: bits of a 64-bit Philox word that make a uniform."""

COMPUTE_DTYPES: Final = ("float64", "float32")
"""PRECISION: what the passes compute in."""

NEGATIVE_FACTOR: Final = 4.0
"""NEGATIVE: the constant c; tests/test_eigenbasis.py measures how much of it is used."""


MOST_ROUNDING: Final = 1 / 64
"""NEGATIVE: the share of tr S_G that may be rounding; `passes.rounding` estimates it."""


class Fisher(StrEnum):
    """FISHER: whose labels the backward pass uses."""

    EXPECTED = "expected"
    SIGNED = "signed"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"


class Rows(StrEnum):
    """ROWS: which positions enter A and G."""

    REACHED = "reached"
    LABELLED = "labelled"
    ALL = "all"
    CLS = "cls"


class Estimator(StrEnum):
    """ESTIMATOR: which sums stand in the place of F."""

    EXPAND = "expand"
    REDUCE = "reduce"
    TOKEN = "token"
    SEQUENCE = "sequence"


class Bias(StrEnum):
    """BIAS: is the bias a column of its layer's matrix, or a block of its own."""

    SEPARATE = "separate"
    JOINT = "joint"


class Gain(StrEnum):
    """nDCG: graded by the rank in the edited model's list (paper) or in the baseline's (code)."""

    PAPER = "paper"
    CODE = "code"


def shard_sequences(width: int) -> int:
    """Sequences in one shard of a corpus whose rows are `width` positions wide (SHARD)."""
    return max(1, SHARD_TOKENS // width)


def describe() -> dict[str, str]:
    """The law as it is written into every file's provenance: name → its sentences in one line."""
    return {name: decision.text for name, decision in LAW.items()}
