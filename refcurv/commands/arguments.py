"""What each command takes: its arguments and their help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from importlib import metadata

from refcurv.commands.examples import EXAMPLES
from refcurv.commands.values import numbers, size

Command = Callable[[argparse.Namespace], bool | None]
"""Its name is the command's, the first line of its docstring the summary; False: it failed."""


_VALUE = re.compile(r"-\.?\d")
"""How a value begins that is below zero; no option begins so."""


def parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The command line; what it parses holds the command in `work`."""
    made = argparse.ArgumentParser(
        prog="refcurv",
        description="The ground truth for the loss curvature of transformers: K-FAC factors, "
        "eigenbases and edits on a CPU, from HDF5 files. Start with: refcurv demo",
        allow_abbrev=False,
    )
    version = f"refcurv {metadata.version('refcurv')}"
    made.add_argument("--version", action="version", version=version)
    known = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for work in commands:
        name, summary = work.__name__, (work.__doc__ or "").partition("\n")[0]
        sub = known.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n  " + "\n  ".join(EXAMPLES[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(work=work)
        sub._negative_number_matcher = _VALUE  # else -3GB is taken for an option
        ARGUMENTS[name](sub)
    return made


# ------------------------------------------------------------------ of one command


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", default="refcurv-demo", help="folder to write (default: %(default)s)")
    _json(sub)


def _report(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _shares(sub, " (default: what recites least on split dev, of a short sweep of --layers)")
    text = "folder to write, a new one or a report's (default: %(default)s)"
    sub.add_argument("--out", default="refcurv-report", help=text)
    text = "take these factors, of the same weights and corpus, instead of collecting"
    sub.add_argument("--factors", metavar="FACTORS", help=text)
    text = "take this basis, of the same weights and corpus, instead of collecting and decomposing"
    sub.add_argument("--basis", metavar="BASIS", help=text)
    text = (
        "pattern (default: blocks.*.mlp.*, or all of --factors or --basis; without --rho some runs "
        "of blocks, of which dev chooses)"
    )
    sub.add_argument("--layers", help=text)
    _how_to_draw(sub)
    _bias(sub)
    sub.set_defaults(layers=None, fisher=None, rows=None, seed=None, bias=None)
    _split(sub)
    _dtype(sub)
    _json(sub)


def _convert(sub: argparse.ArgumentParser) -> None:
    text = "checkpoint directory (config.json, *.safetensors), or a GGUF file"
    sub.add_argument("directory", metavar="DIRECTORY", help=text)
    sub.add_argument("weights", metavar="WEIGHTS", help="weights file (.h5) to write")
    text = "an unknown key of config.json of which you say that it changes nothing; repeatable"
    sub.add_argument("--ignore-key", action="append", default=[], metavar="NAME", help=text)
    sub.add_argument("--verbose", action="store_true", help="a line for each tensor, not each kind")
    _json(sub)


def _export(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS")
    text = "checkpoint directory to write, new or empty"
    sub.add_argument("directory", metavar="DIRECTORY", help=text)
    text = "copy the files of tokenizer and generation from this folder, the checkpoint's own"
    sub.add_argument("--tokenizer-from", metavar="FOLDER", help=text)


def _inspect(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FILE")
    _json(sub)


def _corpus(sub: argparse.ArgumentParser) -> None:
    text = (
        "UTF-8, one document a file; .jsonl: one a line, of text or input_ids, or of prefix and "
        "suffix; .npy: ids, (T,) or (N, T); .bin: ids; .h5: a corpus, alone, that keeps its rows"
    )
    sub.add_argument("texts", nargs="*", metavar="TEXT", help=text)
    _output(sub)
    _how_to_read(sub)
    text = "largest width of a row; longer documents are cut, nothing is dropped (default: 512)"
    sub.add_argument("--length", type=int, default=512, help=text)
    text = "several documents in a row, as segments that do not see one another"
    sub.add_argument("--pack", action="store_true", help=text)
    text = "put this token behind each whole text (default: only what the tokenizer itself adds)"
    sub.add_argument("--eos", metavar="TOKEN", help=text)
    text = "the most tokens of all rows together; what follows is left out (default: no limit)"
    sub.add_argument("--limit", type=int, metavar="TOKENS", help=text)
    text = (
        "repeatable; KIND recite or answer: a .jsonl of prefix and suffix, or of prompt and "
        "answer, its first line a preamble and shots if you like; text: any file, for perplexity; "
        "SPLIT dev or test; CHANCE the score of guessing (default: 0)"
    )
    meta = "NAME:KIND:SPLIT[:CHANCE]=FILE"
    sub.add_argument("--population", action="append", default=[], metavar=meta, help=text)
    _json(sub)


def _recite(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS")
    text = (
        "whole texts: UTF-8, one document a file; .jsonl: one a line, of text or input_ids; "
        ".npy, .bin: ids"
    )
    sub.add_argument("texts", nargs="+", metavar="TEXT", help=text)
    _how_to_read(sub)
    text = (
        "file to write, a passage a line; what it held is replaced at the end, or not at all; the "
        "same command goes on where it was stopped"
    )
    sub.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help=text)
    for name, default, text in (
        ("prefix", 32, "tokens that are given, at least"),
        ("suffix", 16, "tokens that are asked for behind them"),
        ("stride", 8, "tokens from one trial to the next"),
    ):
        sub.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    text = "count so many right tokens in a row as a passage (default: the whole suffix)"
    sub.add_argument("--run", type=int, metavar="N", help=text)
    _dtype(sub)


def _collect(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    _how_to_collect(sub)
    sub.set_defaults(seed=None)
    text = "draws of labels or signs per position; two or more give a standard error (default: 1)"
    sub.add_argument("--draws", type=int, default=1, help=text)
    text = (
        "also find the eigenvalues that half of the corpus gives, so that decompose tells with how "
        "many rows the kept share of pairs settles; twice the memory for sums"
    )
    sub.add_argument("--halves", action="store_true", help=text)
    _memory(sub, "collects block by block, for a model that memory does not hold; default: at once")
    _dtype(sub)


def _memory(sub: argparse.ArgumentParser, how: str) -> None:
    text = f"memory to take at most, such as 6GB or 900MiB; the bits are the same ({how})"
    sub.add_argument("--memory", type=size, metavar="SIZE", help=text)


def _decompose(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FACTORS")
    _output(sub)
    _bias(sub)
    text = "what to keep the eigenvectors in: float64 (default) or, half as large, float32"
    sub.add_argument("--dtype", default="float64", help=text)
    _memory(sub, "fewer matrices at a time; default: what is free")


def _edit(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "BASIS")
    _output(sub)
    _shares(sub)
    text = (
        "cut as much, elsewhere: K-FAC's mask in a random-basis; as many pairs as K-FAC keeps, "
        "random-pairs; by the curvature of the inputs or of the outputs alone"
    )
    meta = "random-basis|random-pairs|inputs|outputs"
    sub.add_argument("--control", metavar=meta, help=text)
    sub.add_argument("--seed", type=int, help="of a random control (default: 0)")
    text = "take a basis that was made from other weights than these; the output says so"
    sub.add_argument("--force", action="store_true", help=text)
    _json(sub)


def _truncate(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS")
    _output(sub)
    text = "share of Σσ² to keep, of the weights of matching layers; repeatable"
    meta = "PATTERN=SHARE"
    sub.add_argument("--energy", action="append", required=True, metavar=meta, help=text)
    _json(sub)


def _prune(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    text = "pattern of the linear layers whose weights may be zeroed"
    sub.add_argument("--layers", required=True, metavar="PATTERN", help=text)
    text = "a population, recite or answer, whose suffixes to forget; the corpus is what to retain"
    sub.add_argument("--forget", required=True, metavar="NAME", help=text)
    text = "share of the weights to zero, of all the layers together"
    sub.add_argument("--ratio", required=True, type=float, help=text)
    text = "weight of what is to be forgotten in the loss (default: 1)"
    sub.add_argument("--weight", type=float, default=1.0, help=text)
    sub.add_argument("--steps", type=int, default=60, help="steps of Adam (default: 60)")
    sub.add_argument("--rate", type=float, default=0.02, help="Adam's rate (default: 0.02)")
    text = "rows of each, corpus and population, in one step (default: 32)"
    sub.add_argument("--batch", type=int, default=32, help=text)
    sub.add_argument("--seed", type=int, default=0, help="of start and batches (default: 0)")
    _dtype(sub)
    _json(sub)


def _evaluate(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    sub.add_argument("--baseline", metavar="WEIGHTS", help="the unedited model to compare with")
    _split(sub)
    _memory(sub, "weights block by block where it does not hold them; default: what is free")
    _dtype(sub)
    text = "also write each item of tokens: nats, right tokens, rank, what is said; a line each"
    sub.add_argument("--items", metavar="OUT.jsonl", help=text)
    text = (
        "also write the corpus without the items that the baseline, or else the model, gets wrong"
    )
    sub.add_argument("--right", metavar="OUT.h5", help=text)
    _json(sub)


def _sweep(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    text = (
        "results, a line for each measurement; until all are done they are in "
        "OUT.jsonl.unfinished, and the same command goes on from there. Factors and basis are "
        "kept beside it"
    )
    sub.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help=text)
    text = "pattern, edited by itself; repeatable"
    sub.add_argument("--layers", action="append", required=True, metavar="PATTERN", help=text)
    text = "of K-FAC: share of the curvature mass to keep, with commas; repeatable"
    sub.add_argument("--rho", action="append", required=True, metavar="SHARES", help=text)
    text = (
        "of kfac, svd, random-basis, random-pairs, inputs, outputs, with commas "
        "(default: the first four)"
    )
    sub.add_argument("--methods", metavar="NAMES", help=text)
    text = (
        "the others cost as much as K-FAC on a dev population: perplexity of a text (default), or "
        "forgetting of passages, in nats; or rho: the same number, whatever it costs"
    )
    sub.add_argument("--match", default="perplexity", metavar="WHAT", help=text)
    text = "the dev population to match on (default: the first text, or the first recite)"
    sub.add_argument("--on", metavar="NAME", help=text)
    sub.add_argument("--split", default="test", help="populations to report: test (default) or dev")
    sub.add_argument("--basis", metavar="BASIS", help="basis of all these layers")
    text = "factors of all these layers, to decompose; without both they are collected from CORPUS"
    sub.add_argument("--factors", metavar="FACTORS", help=text)
    _how_to_draw(sub)
    sub.set_defaults(fisher=None, rows=None)
    text = (
        "disk for states below the edited blocks, at most, such as 6GB "
        "(default: half of what is free); without room they are computed again"
    )
    sub.add_argument("--states", type=size, metavar="SIZE", help=text)
    _memory(sub, "weights block by block where it does not hold them; default: what is free")
    _dtype(sub)
    text = "also draw perplexity against recitation, as PNG"
    sub.add_argument("--plot", metavar="PATH", help=text)
    _json(sub)


def _audit(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    text = "memory to take at most, as 2GB (default: half of what is free); says what it leaves out"
    sub.add_argument("--memory", type=size, metavar="SIZE", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of the random directions (default: 0)")
    text = "prove a sample of the identities to thirty digits, by ball arithmetic"
    sub.add_argument("--certify", action="store_true", help=text)
    text = "seconds for the proofs of --certify (default: 60); it says what it leaves out"
    sub.add_argument("--seconds", type=float, metavar="S", help=text)
    _json(sub)


def _certify(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    text = (
        "of logits, nats, gradient, A, G, hvp, ggnvp, eigenvalues, eigenvectors, cut, edit, and of "
        "small layers hessian, ggn, fisher, "
        "with commas (default: %(default)s)"
    )
    sub.add_argument("--of", default="logits,nats,gradient,A,G", metavar="NAMES", help=text)
    _sequences(sub, "rows of the corpus")
    text = "pattern over linear layers, for all but logits, nats and products (default: all)"
    sub.add_argument("--layers", default="**", metavar="PATTERN", help=text)
    text = "digits of the largest entry that are to be certain (default: %(default)g)"
    sub.add_argument("--digits", default=30, metavar="N", help=text)
    sub.add_argument("--rows", default="reached", help="rows of A and G, as for collect")
    text = "labels of G and fisher: empirical (default), sampled, expected (small models) or signed"
    sub.add_argument("--fisher", default="empirical", help=text)
    sub.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    text = "refuse, before the work, what would take longer; it says what would fit"
    sub.add_argument("--minutes", type=float, metavar="N", help=text)
    text = "for cut and edit: share of the curvature mass to keep, as refcurv edit takes it"
    sub.add_argument("--rho", action="append", metavar="[PATTERN=]SHARE", help=text)
    text = "also write every number and its radius (.h5)"
    sub.add_argument("-o", "--output", metavar="FILE", help=text)
    _json(sub)


def _sequences(sub: argparse.ArgumentParser, what: str) -> None:
    text, first = f"{what}, as 0-3 or 0 7 (default: 0)", [range(1)]
    sub.add_argument("--sequences", type=numbers, nargs="+", default=first, metavar="N", help=text)


def _trace(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    _sequences(sub, "rows of the corpus")
    text = "labels: sampled (default), which the file then holds, or empirical"
    sub.add_argument("--fisher", default="sampled", help=text)
    sub.add_argument("--seed", type=int, help="of drawn labels (default: 0)")
    _dtype(sub)


def _validate(sub: argparse.ArgumentParser) -> None:
    text = "their factors, bases or edits: a file or a folder of a known format"
    sub.add_argument("theirs", metavar="THEIRS", nargs="?", help=text)
    text = "arrays of a pass of theirs, as refcurv trace writes; finds where the two programs part"
    sub.add_argument("--trace", metavar="FILE", help=text)
    text = "factors file (.h5); without one they are collected from --model and --corpus"
    sub.add_argument("--reference", metavar="FACTORS", help=text)
    text = "weights file (.h5), with --corpus: causes that must be computed are tried too; without "
    text += "them the search is short, with them it may take minutes, longer for long corpora"
    sub.add_argument("--model", metavar="WEIGHTS", help=text)
    sub.add_argument("--corpus", metavar="CORPUS", help="what the reference was collected from")
    text = "basis of the reference, for theirs that hold eigenvectors, masks or edited weights"
    sub.add_argument("--basis", metavar="BASIS", help=text)
    text = "judge these only (default: all); a layer that theirs lacks fails"
    sub.add_argument("--layers", metavar="PATTERN", help=text)
    text = "our layer and their name for it, where they do not match by themselves; repeatable; "
    text += "stars stand for the same text in both: 'blocks.*.mlp.up=net/layer_*/fc1', '**=net.**'"
    sub.add_argument("--name", action="append", default=[], metavar="OURS=THEIRS", help=text)
    text = "their dtypes: float32, or model=bfloat16,products=float32,sums=float32,solver=float32"
    sub.add_argument("--arithmetic", default="", metavar="DTYPES", help=text)
    text = "what theirs does not say of itself, as fisher=sampled; repeatable"
    sub.add_argument("--declare", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "a dtype whose errors pass though nobody declared it; repeatable"
    sub.add_argument("--accept", action="append", default=[], metavar="DTYPE", help=text)
    sub.add_argument("--html", metavar="PATH", help="also write a page with maps and spectra")
    _sequences(sub, "rows of the corpus that the trace is of")
    text = (
        "a file with an array `labels` (N, T): what theirs drew, -1 where a position has no label; "
    )
    text += "the reference takes them too"
    sub.add_argument("--labels", metavar="FILE", help=text)
    _json(sub)


def _cases(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    text = "folder to write, which must not exist or be empty: a .h5 and a .json for each case"
    sub.add_argument("-o", "--output", dest="folder", required=True, metavar="DIR", help=text)
    text = "pattern over linear layers (default: all)"
    sub.add_argument("--layers", default="**", metavar="PATTERN", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of the drawn labels (default: 0)")


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _demo,
    "report": _report,
    "convert": _convert,
    "export": _export,
    "inspect": _inspect,
    "corpus": _corpus,
    "collect": _collect,
    "decompose": _decompose,
    "edit": _edit,
    "truncate": _truncate,
    "prune": _prune,
    "recite": _recite,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "certify": _certify,
    "audit": _audit,
    "trace": _trace,
    "validate": _validate,
    "cases": _cases,
}


# ------------------------------------------------------------------ of several

MEANINGS = {
    "WEIGHTS": "weights file (.h5)",
    "CORPUS": "corpus file (.h5)",
    "FACTORS": "factors file (.h5)",
    "BASIS": "basis file (.h5)",
    "FILE": "any file of refcurv's (.h5)",
}


def _positional(sub: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        sub.add_argument(name.lower(), metavar=name, help=MEANINGS[name])


def _output(sub: argparse.ArgumentParser) -> None:
    text = "file to write; what it held is replaced at the end, or not at all"
    sub.add_argument("-o", "--output", required=True, metavar="OUT.h5", help=text)


def _dtype(sub: argparse.ArgumentParser) -> None:
    text = "what to compute in: float64 (default) or float32"
    sub.add_argument("--dtype", default="float64", help=text)


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", metavar="PATH", help="also write the table as JSON")


def _how_to_collect(sub: argparse.ArgumentParser) -> None:
    text = "pattern (default: blocks.*.mlp.*); embed and position only where they are spelled out"
    sub.add_argument("--layers", default="blocks.*.mlp.*", help=text)
    _how_to_draw(sub)


def _how_to_draw(sub: argparse.ArgumentParser) -> None:
    text = "sampled (default), signed, empirical or, for small models, expected labels"
    sub.add_argument("--fisher", default="sampled", help=text)
    text = "positions: reached (default), labelled or all; of images all (default) or cls"
    sub.add_argument("--rows", default="reached", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def _how_to_read(sub: argparse.ArgumentParser) -> None:
    text = "tokenizer.json, the folder that has it, or a GGUF file; not needed for ids alone"
    sub.add_argument("--tokenizer", metavar="JSON", help=text)
    text = (
        "what stands between the documents of a text file, as '<|endoftext|>'; is in none of them"
    )
    sub.add_argument("--separator", metavar="TEXT", help=text)
    text = "what a .bin of bare token ids holds, as nanoGPT's uint16; shards of llm.c say it"
    sub.add_argument("--token-dtype", metavar="DTYPE", help=text)


def _split(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--split", default="test", help="test (default) or dev populations")


def _bias(sub: argparse.ArgumentParser) -> None:
    text = "weight alone (separate, default), or with the bias as its last column (joint)"
    sub.add_argument("--bias", default="separate", help=text)


def _shares(sub: argparse.ArgumentParser, without: str = "") -> None:
    """`without`: what is done if none is given; else one must be."""
    text = f"share of the curvature mass to keep, of all or of matching layers; repeatable{without}"
    sub.add_argument(
        "--rho", action="append", required=not without, metavar="[PATTERN=]SHARE", help=text
    )
