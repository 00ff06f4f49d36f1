"""The command line: one thin function per command, nothing computed here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from refcurv.law.checks import RangeError, RefcurvError, require_choice

DONE, JUDGED_AND_FAILED, BAD_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130

EXAMPLES = {
    "demo": ["refcurv demo", "refcurv demo --out results/"],
    "report": [
        "refcurv report w.h5 corpus.h5 --rho 'blocks.{23-25}.mlp.{gate,up}=0.6' --out results/",
        "refcurv report w.h5 corpus.h5 --layers 'blocks.11.mlp.*' --rho 0.75 --split dev",
    ],
    "convert": ["refcurv convert ~/models/OLMo-2-1B olmo2-1b.h5"],
    "export": ["refcurv export edited.h5 olmo2-1b-edited/"],
    "corpus": [
        "refcurv corpus books/*.txt --tokenizer tokenizer.json -o corpus.h5 --length 512 --pack",
        "refcurv corpus pile.jsonl --tokenizer tokenizer.json -o corpus.h5 \\\n"
        "      --population quotes:recite:test=quotes.jsonl --population clean:text:test=clean.txt",
        "refcurv corpus tokens.npy -o corpus.h5",
        "refcurv corpus corpus.h5 -o more.h5 --population facts:answer:dev=facts.jsonl",
    ],
    "inspect": ["refcurv inspect olmo2-1b.h5", "refcurv inspect factors.h5 --json facts.json"],
    "collect": [
        "refcurv collect w.h5 corpus.h5 -o factors.h5 --layers 'blocks.*.mlp.*'",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --layers 'blocks.{23-25}.mlp.{gate,up}' "
        "--dtype float32",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --fisher signed --draws 8",
        "refcurv collect vit.h5 images.h5 -o f.h5 --layers 'blocks.*.mlp.*' --rows cls",
    ],
    "decompose": [
        "refcurv decompose factors.h5 -o basis.h5",
        "refcurv decompose factors.h5 -o basis.h5 --bias joint",
    ],
    "edit": [
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 'blocks.{23-25}.mlp.{gate,up}=0.6'",
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 0.9",
        "refcurv edit w.h5 basis.h5 -o control.h5 --rho 0.9 --control random-basis --seed 1",
        "refcurv edit w.h5 basis.h5 -o control.h5 --rho 0.9 --control inputs",
    ],
    "truncate": [
        "refcurv truncate w.h5 -o truncated.h5 --energy 'blocks.{23-25}.mlp.{gate,up}=0.7'",
        "refcurv truncate w.h5 -o truncated.h5 --energy '**.gate=0.5' --energy '**.up=0.9'",
    ],
    "prune": [
        "refcurv prune w.h5 corpus.h5 -o pruned.h5 --layers 'blocks.{23-25}.mlp.{gate,up}' \\\n"
        "      --forget quotes --ratio 0.05 --dtype float32",
        "refcurv prune w.h5 corpus.h5 -o pruned.h5 --layers '**.up' --forget quotes --ratio 0.01 "
        "--weight 0.7",
    ],
    "audit": [
        "refcurv audit w.h5 corpus.h5",
        "refcurv audit w.h5 corpus.h5 --memory 2 --json audit.json",
    ],
    "evaluate": [
        "refcurv evaluate edited.h5 corpus.h5 --baseline w.h5",
        "refcurv evaluate w.h5 corpus.h5 --split dev --json dev.json",
    ],
}


# ------------------------------------------------------------------ commands


def demo(args: argparse.Namespace) -> None:
    """Run the paper on the shipped model: table, plots, report.html, results.json."""
    from refcurv.demo.run import run

    _show(run(Path(args.out), progress_bar), args)


def report(args: argparse.Namespace) -> None:
    """Collect, decompose, edit and evaluate on your own files: table, plots, report.html."""
    from refcurv.demo.run import Job, run

    choices = ("weights", "corpus", "layers", "fisher", "rows", "seed", "bias", "split", "dtype")
    job = Job(rho=_rho(args.rho), **{name: getattr(args, name) for name in choices})
    _show(run(Path(args.out), progress_bar, job), args)


def _show(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table; write the plots that there is something for, and the page."""
    from refcurv.law.checks import EmptyError
    from refcurv.report import page, plots
    from refcurv.report.table import format_results

    out = Path(args.out)
    print(format_results(results))
    written = ["results.json", "factors.h5", "basis.h5", "edited.h5"]
    for name, draw in plots.FIGURES.items():
        try:
            figure = draw(results)
        except EmptyError:  # no populations, no bands
            continue
        plots.save(figure, out / f"{name}.png")
        written.append(f"{name}.png")
    page.write_page(results, out / "report.html")
    print(f"\nwritten to {out}/: report.html, {', '.join(sorted(written))}")
    _write_json(args.json, results)


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint directory (config.json, *.safetensors) into a weights file."""
    import refcurv as rc
    from refcurv.report.table import format_rows

    mapped = rc.convert(args.directory, args.weights)
    rows = [[m.checkpoint_name, m.name or "(ignored)", _shape(m.shape), m.dtype] for m in mapped]
    print(format_rows(["checkpoint", "refcurv", "shape", "stored as"], rows, "llll"))
    parameters = sum(m.name is not None for m in mapped)
    print(f"\n{len({m.checkpoint_name for m in mapped})} tensors → {parameters} parameters in "
          f"{args.weights}")  # fmt: skip
    _write_json(args.json, [dict(zip(("checkpoint_name", "name", "shape", "dtype"), r, strict=True))
                            for r in rows])  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads."""
    import refcurv as rc

    rc.export(args.weights, args.directory)
    print(f"{args.weights} → {args.directory}/config.json, model.safetensors")


def inspect(args: argparse.Namespace) -> None:
    """Say what a file is, what it was made from, what it holds, and verify its checksums."""
    from refcurv.files.inspect import inspect_file
    from refcurv.report.table import format_inspect

    facts = inspect_file(args.file, progress=progress_bar("verify"))
    print(format_inspect(facts))
    _write_json(args.json, facts)


def corpus(args: argparse.Namespace) -> None:
    """Tokenize texts, JSON lines and arrays of ids into a corpus file with populations."""
    import refcurv as rc
    from refcurv.files.texts import require_apart

    inputs = [*args.texts, *([args.tokenizer] if args.tokenizer else [])]
    require_apart(args.output, inputs, args.population)
    made = rc.build_corpus(
        args.texts,
        args.tokenizer,
        length=args.length,
        pack=args.pack,
        eos=args.eos,
        populations=args.population,
        progress=progress_bar("tokenize"),
    )
    made_from = made.source["made_from"]
    rc.save_corpus(made, args.output)
    print("\n".join(_corpus_lines(made_from["counts"])))
    print(f"→ {args.output}")
    _write_json(args.json, made_from)


def collect(args: argparse.Namespace) -> None:
    """Accumulate the factors A and G of linear layers over a corpus."""
    import refcurv as rc
    from refcurv.curvature.factors import least_certain
    from refcurv.files.disk import output_path

    output_path("collect", args.output)  # before the work, not after it
    model = rc.load(args.weights, dtype=args.dtype)
    factors = rc.collect(
        model,
        rc.load_corpus(args.corpus),
        args.layers,
        args.fisher,
        args.seed,
        args.draws,
        rows=args.rows,
        checkpoint=f"{args.output}.unfinished",
        progress=progress_bar("collect"),
    )
    rc.save_factors(factors, args.output)
    rows = {name: factor.n_A for name, factor in factors.items()}
    most = max(rows.values())
    few = ", ".join(f"{name} {n:,}" for name, n in rows.items() if n != most)  # of images
    print(f"{_layers(len(factors))}, {most:,} rows{few and f' ({few})'} → {args.output}")
    if worst := least_certain(factors):
        layer, share = worst
        print(f"standard error of G over the draws: at most {share:.2%} of |G|, in {layer}")


def decompose(args: argparse.Namespace) -> None:
    """Compute the eigenbases of A and G of every layer in a factors file."""
    import refcurv as rc
    from refcurv.curvature.eigenbasis import decompose_to

    factors = rc.load_factors(args.factors)
    decompose_to(factors, args.output, args.bias, progress=progress_bar("decompose"))
    print(f"{_layers(len(factors))} → {args.output}")


def edit(args: argparse.Namespace) -> None:
    """Keep the sharpest directions of weight matrices, zero the flat ones."""
    import refcurv as rc
    from refcurv.editing.variants import control
    from refcurv.files import store

    rho, model, basis = _rho(args.rho), rc.load(args.weights), rc.load_bases(args.basis)
    came_from = {"inputs": store.inputs(model.source, basis.source)}
    if args.control is None:
        _save_edit(args, *rc.edit(model, basis, rho), **came_from)
    else:
        made = control(model, basis, rho, args.control, args.seed)
        _save_edit(args, *made, seed=args.seed, **came_from)


def truncate(args: argparse.Namespace) -> None:
    """Keep the largest singular values of weight matrices: an edit that needs no data."""
    import refcurv as rc

    energy = _rho(args.energy, "truncate: --energy takes PATTERN=SHARE")
    _save_edit(args, *rc.truncate(rc.load(args.weights), energy))


def prune(args: argparse.Namespace) -> None:
    """Learn which weights to zero to forget a population and retain the corpus's own tokens."""
    import refcurv as rc
    from refcurv.files.disk import output_path

    output_path("prune", args.output)  # before the work, not after it
    corpus = rc.load_corpus(args.corpus)
    forget = require_choice("prune", "--forget", args.forget, corpus.populations)
    scores = rc.train_scores(
        rc.load(args.weights, dtype=args.dtype),
        args.layers,
        corpus.populations[forget],  # type: ignore[arg-type]  # it refuses images
        corpus,
        ratio=args.ratio,
        weight=args.weight,
        steps=args.steps,
        rate=args.rate,
        batch=args.batch,
        seed=args.seed,
        progress=progress_bar("train"),
    )
    edited, record = rc.prune(rc.load(args.weights), scores)
    _save_edit(args, edited, record, bsn=scores.settings(), **scores.source)


def _save_edit(args: argparse.Namespace, edited: Any, record: Any, **made_from: Any) -> None:
    """Write an edited model, print its record."""
    import refcurv as rc
    from refcurv.report.table import format_edit

    rc.save(edited, args.output, {"edit": record.to_json(), **made_from})
    print(format_edit(record.to_json()))
    print(f"\n{_layers(len(record.layers))} edited → {args.output}")
    _write_json(args.json, record.to_json())


def evaluate(args: argparse.Namespace) -> None:
    """Judge a model on the corpus's populations, beside a baseline if one is given."""
    import refcurv as rc
    from refcurv.report.table import format_evaluation

    baseline = rc.load(args.baseline, dtype=args.dtype) if args.baseline else None
    table = rc.evaluate(
        rc.load(args.weights, dtype=args.dtype),
        rc.load_corpus(args.corpus),
        split=args.split,
        baseline=baseline,
        progress=progress_bar("evaluate"),
    )
    print(format_evaluation(table.to_json()))
    _write_json(args.json, table.to_json())


def audit(args: argparse.Namespace) -> int:
    """Check every identity that can be checked on this model; exit status 1 if one fails."""
    import refcurv as rc
    from refcurv.report.table import format_audit

    found = rc.audit(
        rc.load(args.weights),
        rc.load_corpus(args.corpus),
        memory=args.memory,
        seed=args.seed,
        progress=progress_bar("audit"),
    )
    print(format_audit(found.to_json()))
    _write_json(args.json, found.to_json())
    return DONE if found.passed else JUDGED_AND_FAILED


# ------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refcurv",
        description="The ground truth for the loss curvature of transformers: K-FAC factors, "
        "eigenbases and edits on a CPU, from HDF5 files. Start with: refcurv demo",
    )
    version = f"refcurv {metadata.version('refcurv')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for work, add_arguments in COMMANDS.items():
        summary = (work.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(
            work.__name__,
            help=summary,
            description=summary,
            epilog="examples:\n  " + "\n  ".join(EXAMPLES[work.__name__]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(work=work)
        add_arguments(sub)
    return parser


def _demo_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", default="refcurv-demo", help="folder to write (default: %(default)s)")
    _json(sub)


def _report_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _shares(sub)
    text = "folder to write (default: %(default)s)"
    sub.add_argument("--out", default="refcurv-report", help=text)
    _how_to_collect(sub)
    _bias(sub)
    sub.add_argument("--split", default="test", help="test (default) or dev populations")
    _dtype(sub)
    _json(sub)


def _convert_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "DIRECTORY", "WEIGHTS")
    _json(sub)


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "DIRECTORY")


def _inspect_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FILE")
    _json(sub)


def _corpus_arguments(sub: argparse.ArgumentParser) -> None:
    text = (
        "one document a file; .jsonl: one a line, of text or input_ids, or of prefix and suffix; "
        ".npy: ids, (T,) or (N, T); .h5: a corpus, alone, that keeps its rows"
    )
    sub.add_argument("texts", nargs="*", metavar="TEXT", help=text)
    _output(sub)
    sub.add_argument("--tokenizer", metavar="JSON", help="tokenizer.json; not needed for ids alone")
    text = "largest width of a row; longer documents are cut, nothing is dropped (default: 512)"
    sub.add_argument("--length", type=int, default=512, help=text)
    text = "several documents in a row, as segments that do not see one another"
    sub.add_argument("--pack", action="store_true", help=text)
    text = "put this token behind each whole text (default: only what the tokenizer itself adds)"
    sub.add_argument("--eos", metavar="TOKEN", help=text)
    text = (
        "repeatable; KIND recite or answer: a .jsonl of prefix and suffix; text: any file, for "
        "perplexity; SPLIT dev or test; CHANCE the score of guessing (default: 0)"
    )
    meta = "NAME:KIND:SPLIT[:CHANCE]=FILE"
    sub.add_argument("--population", action="append", default=[], metavar=meta, help=text)
    _json(sub)


def _collect_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    _how_to_collect(sub)
    text = "of labels or signs per position; two or more give a standard error (default: 1)"
    sub.add_argument("--draws", type=int, default=1, help=text)
    _dtype(sub)


def _how_to_collect(sub: argparse.ArgumentParser) -> None:
    text = "pattern (default: %(default)s); embed and position only where they are spelled out"
    sub.add_argument("--layers", default="blocks.*.mlp.*", help=text)
    text = "sampled (default), signed, empirical or, for small models, expected labels"
    sub.add_argument("--fisher", default="sampled", help=text)
    text = "positions: reached (default), labelled or all; of images all (default) or cls"
    sub.add_argument("--rows", default="reached", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def _decompose_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FACTORS")
    _output(sub)
    _bias(sub)


def _bias(sub: argparse.ArgumentParser) -> None:
    text = "weight alone (separate, default), or with the bias as its last column (joint)"
    sub.add_argument("--bias", default="separate", help=text)


def _edit_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "BASIS")
    _output(sub)
    _shares(sub)
    text = (
        "cut as much, elsewhere: K-FAC's mask in a random-basis; as many pairs as K-FAC keeps, "
        "random-pairs; by the curvature of the inputs or of the outputs alone"
    )
    meta = "random-basis|random-pairs|inputs|outputs"
    sub.add_argument("--control", metavar=meta, help=text)
    sub.add_argument("--seed", type=int, default=0, help="of a random control (default: 0)")
    _json(sub)


def _truncate_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS")
    _output(sub)
    text = "share of Σσ² to keep, of the weights of matching layers; repeatable"
    meta = "PATTERN=SHARE"
    sub.add_argument("--energy", action="append", required=True, metavar=meta, help=text)
    _json(sub)


def _prune_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    sub.add_argument("--layers", required=True, metavar="PATTERN", help="whose weights")
    text = "a population, recite or answer, whose suffixes to forget; the corpus is what to retain"
    sub.add_argument("--forget", required=True, metavar="NAME", help=text)
    text = "share of the weights to zero, of all the layers together"
    sub.add_argument("--ratio", required=True, type=float, help=text)
    text = "of the forgotten in the loss (default: 1)"
    sub.add_argument("--weight", type=float, default=1.0, help=text)
    sub.add_argument("--steps", type=int, default=60, help="of Adam (default: 60)")
    sub.add_argument("--rate", type=float, default=0.02, help="Adam's (default: 0.02)")
    text = "rows of each, corpus and population, in one step (default: 32)"
    sub.add_argument("--batch", type=int, default=32, help=text)
    sub.add_argument("--seed", type=int, default=0, help="of start and batches (default: 0)")
    _dtype(sub)
    _json(sub)


def _shares(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--rho",
        action="append",
        required=True,
        metavar="[PATTERN=]SHARE",
        help="share of the curvature mass to keep, of all or of matching layers; repeatable",
    )


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    sub.add_argument("--baseline", metavar="WEIGHTS", help="the unedited model to compare with")
    sub.add_argument("--split", default="test", help="test (default) or dev populations")
    _dtype(sub)
    _json(sub)


def _audit_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    text = "GiB that it may take (default: half of what is free); it says what it left out"
    sub.add_argument("--memory", type=float, metavar="GIB", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of the random directions (default: 0)")
    _json(sub)


COMMANDS: dict[
    Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None]
] = {
    demo: _demo_arguments,
    report: _report_arguments,
    convert: _convert_arguments,
    export: _export_arguments,
    inspect: _inspect_arguments,
    corpus: _corpus_arguments,
    collect: _collect_arguments,
    decompose: _decompose_arguments,
    edit: _edit_arguments,
    truncate: _truncate_arguments,
    prune: _prune_arguments,
    evaluate: _evaluate_arguments,
    audit: _audit_arguments,
}

MEANINGS = {
    "WEIGHTS": "weights file (.h5)",
    "CORPUS": "corpus file (.h5)",
    "FACTORS": "factors file (.h5)",
    "BASIS": "basis file (.h5)",
    "FILE": "any file of refcurv's (.h5)",
    "DIRECTORY": "checkpoint directory",
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


def _rho(texts: Sequence[str], asks: str = "edit: --rho takes [PATTERN=]SHARE") -> Any:
    """['0.9'] → 0.9; ['PATTERN=0.9', ...] → {pattern: share}."""
    out: dict[str, float] = {}
    for text in texts:
        pattern, equals, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            raise RangeError(f"{asks}; got {text!r}.") from None
        if not equals and len(texts) == 1:
            return value
        if not pattern or pattern in out:
            raise RangeError(f"{asks}, each pattern once; got {text!r}.")
        out[pattern] = value
    return out


def _corpus_lines(counts: dict[str, Any]) -> Iterator[str]:
    """What became of the texts: nothing is left out, cut or ignored without a word."""
    if counts.get("rows"):
        yield (
            "{documents:,} documents, {tokens:,} tokens → {rows:,} rows of {width:,}: {padding:,} "
            "positions of padding, {cuts:,} cuts within documents, {unlabelled:,} tokens without "
            "a label".format_map(counts)
        )
    for name, found in counts["populations"].items():
        yield f"{name}: " + (
            "{kind}, {split}, {rows:,} rows of at most {width:,}: {tokens:,} tokens, {asked:,} of "
            "them asked for".format_map(found)
        )
    parts = [counts, *counts["populations"].values()]
    if empty := sum(part.get("empty", 0) for part in parts):
        yield f"left out: {empty:,} documents without a token"
    if seams := sum(part.get("seams", 0) for part in parts):
        yield f"long texts were tokenized in pieces, with {seams:,} seams at line ends"
    if counts["ignored_keys"]:
        yield f"keys ignored: {', '.join(map(repr, counts['ignored_keys']))}"


def _layers(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _write_json(path: str | None, data: object) -> None:
    if path:
        from refcurv.files.disk import write_json

        write_json(data, path)


def progress_bar(label: str) -> Callable[[int, int], None]:
    """A bar on stderr, if that is a terminal; called with (done, all)."""
    from tqdm import tqdm

    bar: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=f"{label:>10}", disable=None, file=sys.stderr)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


# ------------------------------------------------------------------ entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Every error is one line on stderr."""
    try:
        args = _parser().parse_args(arguments)
        if getattr(args, "json", None):
            from refcurv.files.disk import output_path

            output_path(args.command, args.json)  # before the work, not after it
        status = args.work(args)
        sys.stdout.flush()
        return DONE if status is None else int(status)
    except RefcurvError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        hint = (
            "interrupted; no output was changed. A collection goes on where it was when run again"
        )
        return _fail(hint, INTERRUPTED)
    except MemoryError as error:
        return _fail(
            f"out of memory: {error}. Fewer --layers, or --dtype float32, need less", MACHINE
        )
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        kind = MACHINE if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT) else BAD_INPUT
        return _fail(str(error), kind)


def _fail(message: str, status: int) -> int:
    print(f"refcurv: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
