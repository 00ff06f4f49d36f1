"""The bugs of METHOD, Bugs, as data: their names, how they show, and what to change.

`diagnose` finds them in another program's factors; `Cause` says them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, or another convention that looks like one.

    Fields:
        name: what they did, shows: how it shows; the words of METHOD, Bugs.
        remedy: what to change in their code. libraries: the same in a library's own words.
        trace: does a dump of factors, bases or edits show it?
    """

    name: str
    shows: str
    remedy: str
    trace: bool = True
    libraries: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def advice(self, program: str) -> str:
        """What to change, in the words of that program where they are known."""
        return " ".join(filter(None, (self.remedy, self.libraries.get(program))))


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        "B1": Fault(
            "g of the mean loss",
            "G' = G/m², one m for all layers; the edit does not change",
            'Sum the loss over positions before the backward pass (reduction="sum"), or '
            "multiply G by m².",
            libraries={
                "official": 'cross_entropy averages by default: give it reduction="sum".',
            },
        ),
        "B2": Fault(
            "g of the mean loss, last batch smaller",
            "G' is a sum of batches weighted by 1/m², no multiple of G",
            "Sum the loss instead of averaging it: a last batch that is smaller then "
            "needs no care.",
        ),
        "B3": Fault(
            "each sequence's loss divided by its length",
            "as B2, weights 1/length²",
            "Do not divide the loss of a sequence by its length.",
            libraries={
                "bergson": 'Set loss_reduction="sum".',
            },
        ),
        "B4": Fault(
            "divided by sequences, or labels, instead of rows",
            "r_A = r_G, the ratio of the two counts",
            "Divide both sums by the number of rows that were added, and by nothing else.",
            libraries={
                "kronfluence": "Count the rows that get_attention_mask keeps.",
            },
        ),
        "B5": Fault(
            "curvature counted twice, or by half",
            "r_G = 2 or ½; of a square loss: without its ½, or with one too many",
            "Look for a 2 or ½ that enters G alone: the Hessian of the loss or its root doubled or "
            "halved, or rows that were added twice and counted once. Cross-entropy has no ½.",
            libraries={
                "curvlinops": "Of a square loss, ½|y − t|² has the gradient y − t.",
            },
        ),
        "B6": Fault(
            "a mean over the network's outputs",
            "the ratio is the number of outputs, perhaps as its root in A and in G",
            "Do not average over outputs: a mean divides G by their number, or its square. What a "
            "position sends back is a sum over all entries of the vocabulary.",
        ),
        "B7": Fault(
            "loss terms counted by the layer's positions",
            "a ratio of its own for each layer",
            "Count loss terms at the output of the network, once for all layers.",
        ),
        "B8": Fault(
            "scale in A instead of G, or split",
            "r_A r_G agrees, each alone does not; no fault",
            "Nothing needs to change: K is the same. State where the scale is kept.",
            trace=False,
        ),
        "B9": Fault(
            "a moving average instead of a mean",
            "late batches weigh more, geometrically",
            "Add up sums and counts, and divide once at the end; switch the decay off.",
        ),
        "B10": Fault(
            "Λ divided by sequences, A and G by rows",
            "ΣΛ/(tr A tr G) is about the tokens of a sequence",
            "Divide Λ by the count that A and G are divided by, or keep both as sums.",
        ),
        "B11": Fault(
            "the scale of mixed precision left in",
            "r_G is a power of 4",
            "Divide the gradients by the loss scale before they enter G, or G by its square.",
            libraries={
                "kronfluence": "Set gradient_scale to the scale of the loss.",
            },
        ),
        "B12": Fault(
            "damping inside the stored factors",
            "A' − A is a multiple of I",
            "Store A and G without damping, and add it when they are inverted.",
        ),
        "B13": Fault(
            "damping split by a wrong ratio of traces",
            "damped inverses alone differ",
            "Write the two shares of the damping as the root of (tr A/d_in)/(tr G/d_out).",
            trace=False,
        ),
        "B14": Fault(
            "a convolution's count of places missing",
            "convolutions differ by it, or its square",
            "Count each place of a convolution as a row, in A, in G and in the count.",
        ),
        "B15": Fault(
            "labels of the data called Fisher",
            "A agrees, G has another shape, and E g ≠ 0 (O40)",
            "Draw the labels of the backward pass from the model's own softmax.",
            libraries={
                "official": "Pass --sample_labels.",
                "kronfluence": "Set use_empirical_fisher=False, and draw where sample=True.",
                "bergson": "Set use_dataset_labels=False.",
                "curvlinops": "Take FisherType.MC or TYPE2.",
            },
        ),
        "B16": Fault(
            "the likeliest label instead of a drawn one",
            "the head's trace of O41, the same for every seed",
            "Draw the label from the softmax instead of taking its maximum.",
            libraries={
                "kronfluence": "In compute_train_loss draw from the softmax where sample=True.",
            },
        ),
        "B17": Fault(
            "one drawn number for all positions or batches",
            "unbiased, but the error does not fall with more data",
            "Draw anew at each position of each batch; do not set the seed inside the loop.",
        ),
        "B18": Fault(
            "all positions' root columns at once",
            "G agrees in the last block but for k and v, not below (O13)",
            "Send back one loss position at a time, or draw a sign for each position.",
            libraries={
                "curvlinops": "Take FisherType.MC where positions mix.",
            },
        ),
        "B19": Fault(
            "labels drawn at padding too",
            "G' − G ≥ 0, only where lengths differ",
            "Draw labels where the corpus has one, and give all other positions no loss.",
            libraries={
                "bergson": "Draw labels, then mask them as the data's labels are masked.",
            },
        ),
        "B20": Fault(
            "prompt positions left out, or kept",
            "n' is the labelled count; A' is A of these rows",
            "Choose rows by one rule for a, for g and for the count; say which it is.",
        ),
        "B21": Fault(
            "drawn with temperature, cut tails or rounded p",
            "the head's trace is below 1 − Σp²",
            "Draw from the plain softmax, in float32 at least: no temperature, no cut tails.",
        ),
        "B22": Fault(
            "labels shifted twice",
            "A agrees, the loss is far too high",
            "Shift the labels once: either in the data or in the loss.",
        ),
        "B23": Fault(
            "labels not shifted",
            "each position predicts itself: the loss is too low",
            "Shift the labels by one, so that a position predicts its next token.",
        ),
        "B24": Fault(
            'another number for "no label"',
            "ignored tokens are a class, or a crash; n' too large",
            "Give the loss the ignore_index that the labels are made with.",
        ),
        "B25": Fault(
            "padding found by the id, which also ends texts",
            "texts lose the label behind their end",
            "Take the mask of the tokenizer, not a comparison with the pad's id.",
        ),
        "B26": Fault(
            "smoothing, z-loss, auxiliary loss or soft-cap confused",
            "z-loss and soft-cap break O16",
            "Use the plain cross-entropy of the logits as the model defines them, and "
            "nothing added.",
        ),
        "B27": Fault(
            "the last position counted",
            "G' = G (T − 1)/T, and A' has its rows",
            "Drop the last position of each sequence from a and from the count: it has no label.",
            libraries={
                "kronfluence": "Let get_attention_mask be 0 at each sequence's last position.",
            },
        ),
        "B28": Fault(
            "padding counted",
            "A' has a spike along the pad's input; n' = B T",
            "Select rows by the attention mask before a aᵀ is summed, and count these rows alone.",
            libraries={
                "kronfluence": "Return the mask from get_attention_mask.",
                "bergson": "Pass the attention mask to the collector.",
            },
        ),
        "B29": Fault(
            "a mask that is silently skipped where shapes differ",
            "A is wrong in some layers",
            "Raise an error where the mask has another shape than the rows; never skip it.",
        ),
        "B30": Fault(
            "the bias's 1 not masked",
            "the corner of A is not 1 (O47)",
            "Append the 1 before the mask is applied, so that masked rows are 0 in every column.",
        ),
        "B31": Fault(
            "bias column missing, too many, or first",
            "another shape, or a permutation",
            "Append the 1 as last column of the inputs where the layer has a bias, and only there.",
            libraries={
                "bergson": "Set include_bias as the reference has it.",
                "curvlinops": "Set separate_weight_and_bias as the reference has it.",
            },
        ),
        "B32": Fault(
            "A and G swapped",
            "shapes; if square, A' is G",
            "Store the inputs' moment as A, the gradients' as G.",
        ),
        "B33": Fault(
            "W stored transposed",
            "factors agree, the edit rotates Wᵀ",
            "Transpose W of such layers (Conv1D stores it as (in, out)) before it is rotated.",
        ),
        "B34": Fault(
            "the input taken before or behind a norm, or of a neighbour",
            "A' is another tensor's A",
            "Hook the linear layer itself, and take its input.",
        ),
        "B35": Fault(
            "G at the input, or behind the activation",
            "its size is d_in, or it is the next tensor's G",
            "Hook the linear layer itself, and take the gradient at its output, before "
            "activations.",
        ),
        "B36": Fault(
            "positions summed before the outer product",
            "rank ≤ sequences, the top eigenvalue about T times larger",
            "Flatten batch and positions to rows before the outer product; sum no positions first.",
            libraries={
                "curvlinops": "Set kfac_approx to KFACType.EXPAND.",
            },
        ),
        "B37": Fault(
            "expand or reduce taken for the other",
            "off by T, or T²",
            "State one of expand and reduce, and divide by its count.",
            libraries={
                "curvlinops": "Set kfac_approx as the reference has it.",
            },
        ),
        "B38": Fault(
            "the factors of another layer",
            "A' is that layer's A",
            "Look up the name, or the block's index, by which the factors are stored.",
        ),
        "B39": Fault(
            "hooks that fire twice",
            "n_A' = 2 n_G'; means agree",
            "Let hooks act only while gradients are on, or take them off while the "
            "forward is repeated.",
        ),
        "B40": Fault(
            "a layer that is called twice, tied weights",
            "n' = 2 n and a mixture, or the last call only",
            "Collect for each use of the layer by itself, or say that uses are summed, "
            "also in the count.",
        ),
        "B41": Fault(
            "a buffer overwritten",
            "A' is the last batch's",
            "Add each batch to the sums (+=); do not replace them.",
        ),
        "B42": Fault(
            "an activation or a sum computed in place",
            "G before it is wrong, or A is of what came later; or a crash",
            "Switch in-place operations off, or copy what the hook receives.",
        ),
        "B43": Fault(
            "the loss divided by accumulation steps k",
            "r_G = 1/k²",
            "Multiply g by the accumulation steps k, or leave the division to the optimiser.",
        ),
        "B44": Fault(
            "g averaged over the batch, then squared",
            "rank G' ≤ batches",
            "Form g gᵀ for each row, and only then sum.",
        ),
        "B45": Fault(
            "the mean subtracted",
            "A' = A − mean meanᵀ, of rank one",
            "Do not subtract the mean: A and G are second moments about 0.",
        ),
        "B46": Fault(
            "gradients averaged over workers first, or one worker's sums only",
            "r_G = 1/workers², or n' = n/workers",
            "Keep gradients local until g gᵀ is formed, then add sums and counts over all workers.",
        ),
        "B47": Fault(
            "parts joined along the wrong axis or in wrong order",
            "rows permuted by blocks, symmetry lost",
            "Join row shards along axis 0 in the order of ranks, with the rows that each rank has.",
        ),
        "B48": Fault(
            "a frozen layer without a hook",
            "it is missing, or 0",
            "Let the layer require gradients, and see that its hook fires.",
        ),
        "B49": Fault(
            "no chat template, or two start tokens",
            "a spike in A along the first token's input",
            "Build texts as in training, with one start token.",
        ),
        "B50": Fault(
            "attention to the future, to padding, to other documents",
            "O39 and O52 fail",
            "Pass a causal mask that also separates documents and hides padding.",
        ),
        "B51": Fault(
            "rotary pairs interleaved instead of in halves",
            "rows of q and k are permuted; the spectra agree, the loss is high",
            "Use the checkpoint's layout of rotary pairs; permute rows of q and k only with it. "
            "Compute frequencies and angles in float32.",
        ),
        "B52": Fault(
            "query groups tiled instead of repeated",
            "logits differ, and k and v gradients by head (O33)",
            "Repeat each key-value head for the query heads of its group, one after another.",
        ),
        "B53": Fault(
            "eps outside the root, 1 + gain for gain, norm in another dtype",
            "the defect of O34; logits off by 1e-3",
            "Take eps, its place, the gain's offset and the norm's dtype from the "
            "checkpoint's code.",
        ),
        "B54": Fault(
            "another GELU, attention scale, kind of QK-norm or soft-cap",
            "logits differ",
            "Take activation, attention scale, norms and caps from the checkpoint's configuration.",
        ),
        "B55": Fault(
            "dropout on",
            "two runs differ",
            "Call eval(), and set the attention's dropout to 0.",
        ),
        "B56": Fault(
            "attention kernels that depend on the batch",
            "padded and separate runs differ",
            "Use a kernel of attention that does not depend on the batch, or one sequence "
            "at a time.",
        ),
        "B57": Fault(
            "another checkpoint or dtype",
            "A agrees in the first layer and drifts with depth",
            "Load the same checkpoint, in the dtype that is declared.",
        ),
        "B58": Fault(
            "sums in bfloat16",
            "noise of 2⁻⁸, negative eigenvalues, sums that stall",
            "Add a aᵀ and g gᵀ in float32 or float64.",
            libraries={
                "bergson": "Set hessian_dtype to fp32.",
                "kronfluence": "Set activation_covariance_dtype and gradient_covariance_dtype to "
                "torch.float32.",
            },
        ),
        "B59": Fault(
            "model in bfloat16, sums in float32",
            "errors of 1e-2 over the tail of the spectrum",
            "Run the model in float32, or declare that it is bfloat16.",
            libraries={
                "official": "Load the model with torch_dtype=torch.float32.",
            },
        ),
        "B60": Fault(
            "TF32 products",
            "inputs rounded to 2⁻¹¹; nothing to see where they are bfloat16",
            "Switch TF32 off (torch.backends.cuda.matmul.allow_tf32 = False), or declare it.",
            libraries={
                "official": "The collector switches TF32 on: set allow_tf32 = False.",
            },
        ),
        "B61": Fault(
            "float16 overflow or underflow",
            "NaN in rows, exact zeros in G",
            "Run in bfloat16 or float32, or scale the loss and see that nothing overflows.",
        ),
        "B62": Fault(
            "eigensolver in float32",
            "the tail's eigenvectors differ, small eigenvalues mean nothing",
            "Call the eigensolver in float64.",
        ),
        "B63": Fault(
            "long sums in float32",
            "drift with n, and another result per batch size",
            "Add in float64, or in chunks that are added in float64.",
        ),
        "B64": Fault(
            "eigenvectors in rows",
            "Uᵀ diag(μ) U is A, U diag(μ) Uᵀ is not",
            "Read eigenvectors as columns, or transpose before they are stored.",
        ),
        "B65": Fault(
            "ascending order taken for descending",
            "the complement is kept: ‖W'‖ is tiny, recitation stays",
            "Reverse what eigh returns: it ascends.",
        ),
        "B66": Fault(
            "negative eigenvalues made positive, or cut off silently",
            "another spectrum at its end",
            "Set to 0 what rounding explains, count it, and refuse the rest.",
        ),
        "B67": Fault(
            "negative eigenvalues in the mass",
            "kept mass above the total; products of two are positive",
            "Set negative eigenvalues to 0 before mass is counted.",
        ),
        "B68": Fault(
            "ρ = 1 is not the identity: the loop ends when the rounded sum is reached",
            "W' ≠ W at ρ = 1",
            "Return W itself at ρ = 1.",
        ),
        "B69": Fault(
            "the total in float32, the running sum in float64",
            "another number of pairs at large ρ",
            "Sum the total and the running mass in one dtype and order.",
        ),
        "B70": Fault(
            "a cut inside tied pairs",
            "other pairs, the same mass, gap about 0",
            "Order tied pairs by their indices, or keep all of a tie.",
        ),
        "B71": Fault(
            "ρ as an integer 1 taken for another type",
            "a crash",
            "Convert ρ to a float first.",
            trace=False,
        ),
        "B72": Fault(
            "edited weights kept by name and ρ, not by factors",
            "an old W' comes back",
            "Put a digest of the factors into the name of what is kept.",
            trace=False,
        ),
        "B73": Fault(
            "each side cut by itself",
            "the mask is a rectangle, its mass about ρ²",
            "Cut the products λ_i μ_j, not each side.",
        ),
        "B74": Fault(
            "mass by λ, √λ, Λ or λ μ C²",
            "with the last two no staircase (O57)",
            "Rank pairs by λ_i μ_j.",
        ),
        "B75": Fault(
            "Λ squared before or after the wrong sum",
            "diag Uᵀ F_tok U per position, diag Uᵀ F U per sequence",
            "Say whether Λ is per position or per sequence, and square after that sum.",
        ),
        "B76": Fault(
            "Λ of other data than the basis",
            "O22 can fail",
            "Make Λ from the data and labels of the basis.",
        ),
        "B77": Fault(
            "Λ in the activations' dtype",
            "2⁻⁸ errors in Λ alone",
            "Add Λ in float32 or float64.",
            libraries={
                "bergson": "Set hessian_dtype to fp32, and see that Λ follows it.",
            },
        ),
        "B78": Fault(
            "the other Kronecker or vec order",
            "right after a permutation; hidden where W is square",
            "Use G ⊗ A with row-major vec, or A ⊗ G with column-major; not a mixture.",
        ),
        "B79": Fault(
            "nDCG in float16",
            "nDCG with itself is not 1",
            "Compute nDCG in float64.",
            trace=False,
        ),
        "B80": Fault(
            "perplexity as a mean of exp(batch loss)",
            "it depends on the batch size (O66)",
            "Divide all nats by all tokens, and take exp once.",
            trace=False,
        ),
        "B81": Fault(
            "documentation of options that do not exist",
            "the command fails",
            "Compare the documentation with --help.",
            trace=False,
        ),
        "B82": Fault(
            "rows counted in two ways",
            "two numbers n where masks are not full",
            "Count rows where they are added, and store this count.",
        ),
    }
)
