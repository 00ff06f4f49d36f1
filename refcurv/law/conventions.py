"""The law: every ambiguity that makes two right programs disagree, decided here by name.

`LAW` holds the sentences; the constants and enums below are their executable form. Errors quote
the names, every file records them (`describe`), and the README's table is tested to equal `LAW`.
Why each is decided so, and where it is computed and proved: validation/METHOD.md.

Axis letters, used as suffixes of local arrays in `model/` and `passes/`: see `AXES`.
"""

from __future__ import annotations

from collections.abc import Mapping
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

LAW: Final[Mapping[str, str]] = MappingProxyType(
    {
        "LAYOUT": "W is (d_out, d_in); y = x Wᵀ. Checkpoints stored the other way are turned at "
        "conversion.",
        "VEC, KRON": "Row-major vec: rvec(W)[o·I + i] = W[o, i]; the block is G ⊗ A; "
        "(G ⊗ A) rvec(X) = rvec(G X A).",
        "LOSS": "The sum of nats over labelled positions; g is the gradient of that sum.",
        "COUNTS": "Stored: S_A = Σ a aᵀ, n_A, S_G = Σ g gᵀ, n_G = rows × draws. A = S_A/n_A, "
        "G = S_G/n_G, K = n_A (G ⊗ A); G ⊗ A approximates the curvature of the mean loss per row.",
        "BIAS": "`separate` (default): W has K = n_A (G ⊗ A), as without a bias, and b, whose "
        "input is 1, K = n_A G. `joint`: [W b], b the last column, has the input [a; 1] and "
        "A = [[S_A, Σ a], [Σ aᵀ, n_A]] / n_A, whose corner is exactly 1.",
        "EMBEDDING": "A table (V, D) of tokens or positions is the transpose of a linear layer of "
        "one-hot inputs: S_A = diag(counts) over the kept rows, stored as (V,); g is the gradient "
        "of the stored entry, embed_scale included. Tied, `embed` and `head` are the factors of "
        "the two uses by themselves; the shared matrix has F = F_embed + F_head + C + Cᵀ, C their "
        "cross terms, and no K.",
        "VECTOR": "A gain, a bias or a special position of images has no Kronecker form: its block "
        "is F = Σ D Dᵀ over segments (and, for `expected`, loss positions and entries), D the "
        "gradient summed over the segment's positions. A segment is a document of a packed "
        "sequence, a sequence that is not packed, or an image: nothing reaches from one to "
        "another, so that packing and padding change no F, of vectors or matrices.",
        "LABELS": "labels[b, t] is what position t should predict; negative = none. Default of a "
        "causal model: the next token of the same segment, so the last position of a segment has "
        "none. Bidirectional models and images have no default; an image has one label, its class.",
        "ROWS": "`reached` (default): real positions from which a label is reached: in a causal "
        "model those at or before the last labelled one of their segment, in a bidirectional one "
        "all of a segment that has a label, all of an image that has one. `labelled`: only those "
        "with a label. `all`: every real position; of images as `reached`. `cls`: the first "
        "position of an image that has a label. A head that reads images pooled has one row for "
        "each label; patches have no rows for what stands before them.",
        "FISHER": "Whose labels the backward pass uses: `expected` (exact over the vocabulary: one "
        "backward per loss position and entry v, of column v of S = diag(√p) − p √pᵀ), `signed` "
        "(an unbiased estimate of it without labels: one joint backward per segment and draw, of "
        "S ε, ε ∈ {±1}^V at each position), `sampled` (labels drawn from the model: one joint "
        "backward per segment and draw), `empirical` (the corpus's labels: one joint backward per "
        "segment). Only positions where the corpus has a label send anything back.",
        "SAMPLING": "Philox4x64-10, key (seed, 0); the uniform of position t is word t mod 4 of "
        "the block at counter (1 + t div 4, 0, draw, corpus index), its top 53 bits times 2⁻⁵³. "
        "Label: the first v with c_v > u·c_{V−1}, c the sequential float64 cumsum of "
        "exp(z − max z), else the last with positive probability. Signs of position t: entry v is "
        "bit v mod 64 (0 the least significant) of word n = v div 64, which is word n mod 4 of the "
        "block at counter (1 + n div 4, 1 + t, draw, corpus index); 1 means +1, 0 means −1. Of an "
        "image t = 0.",
        "THREE": "F (exact block), F_tok (cross-position terms dropped) and K are three matrices, "
        "never one.",
        "ORDER": "Eigenvalues descending, eigenvectors in columns; the entry of largest magnitude "
        "(lowest index on ties) is positive.",
        "NEGATIVE": "Negative eigenvalues within λ_max·c·(n_shard·eps(compute) + d·eps(float64)) + "
        "d·n_shard·(the smallest number of compute) of 0 become 0 and are counted; a more negative "
        "one is an error. A layer of whose tr S_G "
        "rounding makes more than 1/64 is not edited.",
        "SELECT": "λ and μ are first brought to λ_1, μ_1 in [1, 2) by powers of two. Keys "
        "fl(λ_i μ_j) in float64, descending, ties in row-major order of (i, j). "
        "Kept: the fewest first pairs whose mass ≥ fl(fl(ρ·fsum(λ))·fsum(μ)), where a staircase "
        "with c_i pairs in row i weighs fsum_i fl(λ_i·P[c_i]), P the correctly rounded prefix "
        "sums of μ. ρ = 1 keeps everything and returns W itself; ρ = 0 keeps nothing.",
        "ACCEPTABLE": "Of one A and G two correct solvers differ by at most e_G = "
        "(16·O + 2)·eps·‖λ‖₂ and e_A = (16·I + 2)·eps·‖μ‖₂, in 2-norm over all eigenvalues. So a "
        "key lies between (λ_i − e_G)₊(μ_j − e_A)₊ and (λ_i + e_G)(μ_j + e_A), and the mass of any "
        "set of pairs, less the target, moves by at most s = max(ρ, 1 − ρ)·(√I·Σλ·e_A + √O·Σμ·e_G "
        "+ √(O·I)·e_A·e_G) and the rounding of SELECT. A pair is surely kept if all others that "
        "may come before it weigh less than the target − s; surely dropped if those that must come "
        "before it weigh the target + s or more. `acceptable` counts all other pairs; it is 0 at "
        "ρ = 0 and 1. Of singular values e = (16·max(O, I) + 2)·eps·‖σ‖₂, the key being σ².",
        "PRECISION": "Exact widening on reading; one dtype for computing (float64, or float32 by "
        "choice); the products of one backward pass over a shard in that dtype, in float64 where "
        "all of float32's would vanish; the fold over passes and shards, eigensolvers, factors and "
        "bases in float64; edited weights in the dtype of their source.",
        "SHARD, BLOCK": "Shard = max(1, 2048 div T) consecutive sequences, T the corpus's width "
        "(of images: the model's positions); the head in chunks of 512 kept rows; block = 64 "
        "consecutive shards. A shard's backward passes (by draw, or by position and then entry) "
        "are added in order to a shard sum that starts from zero, shard sums to a block sum that "
        "starts from zero, block sums to the total.",
        "FINGERPRINT": "A collection goes on from a checkpoint only if it shares with the run that "
        "began it: the files of weights and corpus (SHA-256), layers, fisher, seed, draws, rows, "
        "dtype, this law, the versions of refcurv, Python, NumPy, SciPy, Numba and h5py, the BLAS "
        "kernels, the CPU's features and how the kernels are compiled. What differs is named.",
    }
)

NO_LABEL: Final = -1
"""LABELS: the label of a position that predicts nothing (any negative number is read so)."""

SHARD_TOKENS: Final = 2048
"""SHARD: positions in one unit of computation."""

HEAD_ROWS: Final = 512
"""SHARD: rows whose logits exist at one time."""

BLOCK_SHARDS: Final = 64
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
    """The law as it is written into every file's provenance."""
    return dict(LAW)
