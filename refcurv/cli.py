"""The command line: one thin function per command, nothing computed here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from refcurv.law.checks import RangeError, RefcurvError

DONE, JUDGED_AND_FAILED, BAD_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130

EXAMPLES = {
    "demo": ["refcurv demo", "refcurv demo --out results/"],
    "convert": ["refcurv convert ~/models/OLMo-2-1B olmo2-1b.h5"],
    "export": ["refcurv export edited.h5 olmo2-1b-edited/"],
    "inspect": ["refcurv inspect olmo2-1b.h5", "refcurv inspect factors.h5 --json facts.json"],
    "collect": [
        "refcurv collect w.h5 corpus.h5 -o factors.h5 --layers 'blocks.*.mlp.*'",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --layers 'blocks.{23-25}.mlp.{gate,up}' "
        "--dtype float32",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --fisher signed --draws 8",
    ],
    "decompose": ["refcurv decompose factors.h5 -o basis.h5"],
    "edit": [
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 'blocks.{23-25}.mlp.{gate,up}=0.6'",
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 0.9",
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
    from refcurv.report import page, plots
    from refcurv.report.table import format_results

    out = Path(args.out)
    results = run(out, progress_bar)
    print(format_results(results))
    written = ["results.json", "factors.h5", "basis.h5", "edited.h5"]
    for name in ("spectrum", "bands", "retention"):
        plots.save(getattr(plots, name)(results), out / f"{name}.png")
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
    print(f"\n{len(mapped)} tensors → {args.weights}")
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
    one = next(iter(factors.values()))
    print(f"{len(factors)} layers, {one.n_A:,} rows → {args.output}")
    if worst := least_certain(factors):
        layer, share = worst
        print(f"standard error of G over the draws: at most {share:.2%} of |G|, in {layer}")


def decompose(args: argparse.Namespace) -> None:
    """Compute the eigenbases of A and G of every layer in a factors file."""
    import refcurv as rc
    from refcurv.curvature.eigenbasis import decompose_to

    factors = rc.load_factors(args.factors)
    decompose_to(factors, args.output, progress=progress_bar("decompose"))
    print(f"{len(factors)} layers → {args.output}")


def edit(args: argparse.Namespace) -> None:
    """Keep the sharpest directions of weight matrices, zero the flat ones."""
    import refcurv as rc
    from refcurv.report.table import format_edit

    rho = _rho(args.rho)
    edited, record = rc.edit(rc.load(args.weights), rc.load_bases(args.basis), rho)
    rc.save(edited, args.output, {"edit": record.to_json()})
    print(format_edit(record.to_json()))
    print(f"\n{len(record.layers)} layers edited → {args.output}")
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


def _convert_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "DIRECTORY", "WEIGHTS")
    _json(sub)


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "DIRECTORY")


def _inspect_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FILE")
    _json(sub)


def _collect_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "CORPUS")
    _output(sub)
    sub.add_argument("--layers", default="blocks.*.mlp.*", help="pattern (default: %(default)s)")
    text = "sampled (default), signed, empirical or, for small models, expected labels"
    sub.add_argument("--fisher", default="sampled", help=text)
    sub.add_argument("--rows", default="reached", help="reached (default) or labelled positions")
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    text = "of labels or signs per position; two or more give a standard error (default: 1)"
    sub.add_argument("--draws", type=int, default=1, help=text)
    _dtype(sub)


def _decompose_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "FACTORS")
    _output(sub)


def _edit_arguments(sub: argparse.ArgumentParser) -> None:
    _positional(sub, "WEIGHTS", "BASIS")
    _output(sub)
    sub.add_argument(
        "--rho",
        action="append",
        required=True,
        metavar="[PATTERN=]SHARE",
        help="share of the curvature mass to keep, of all or of matching layers; repeatable",
    )
    _json(sub)


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
    convert: _convert_arguments,
    export: _export_arguments,
    inspect: _inspect_arguments,
    collect: _collect_arguments,
    decompose: _decompose_arguments,
    edit: _edit_arguments,
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


def _rho(texts: Sequence[str]) -> float | dict[str, float]:
    """['0.9'] → 0.9; ['PATTERN=0.9', ...] → {pattern: share}."""
    out: dict[str, float] = {}
    for text in texts:
        pattern, equals, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            raise RangeError(f"edit: --rho takes [PATTERN=]SHARE; got {text!r}.") from None
        if not equals and len(texts) == 1:
            return value
        if not pattern or pattern in out:
            raise RangeError(f"edit: --rho {text!r}: give each pattern once, as PATTERN=SHARE.")
        out[pattern] = value
    return out


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _write_json(path: str | None, data: object) -> None:
    if path:
        from refcurv.demo.run import write_json

        write_json(data, Path(path))


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
