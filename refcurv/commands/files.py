"""Files in and out: checkpoints, corpora, and what a file is."""

from __future__ import annotations

import argparse

from refcurv.commands.output import write_json
from refcurv.terminal import progress_bar


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint directory (config.json, *.safetensors) or a GGUF file into weights."""
    from refcurv.files.huggingface import conversion
    from refcurv.report.conversion import format_conversion, rows

    done = conversion(args.directory, args.weights, args.ignore_key)
    print(format_conversion(done, args.weights, args.verbose))
    keys = ("checkpoint_name", "name", "shape", "dtype")
    write_json(args.json, [dict(zip(keys, row, strict=True)) for row in rows(done.mapped)])


def export(args: argparse.Namespace) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads."""
    import refcurv as rc
    from refcurv.report.conversion import format_export

    done = rc.export(args.weights, args.directory, args.tokenizer_from)
    print(format_export(done, args.weights, args.directory))


def inspect(args: argparse.Namespace) -> None:
    """Say what a file is, what it was made from, what it holds, and verify its checksums."""
    from refcurv.curvature.bases_file import kept_by, load_bases
    from refcurv.files.inspect import inspect_file
    from refcurv.report.printed import format_inspect

    facts = inspect_file(args.file, progress=progress_bar("verify"))
    if facts["format"] == "refcurv-basis":
        facts["kept"] = [one.to_json() for one in kept_by(load_bases(args.file))]
    print(format_inspect(facts))
    write_json(args.json, facts)


def corpus(args: argparse.Namespace) -> None:
    """Tokenize texts, JSON lines and arrays of ids into a corpus file with populations."""
    import refcurv as rc
    from refcurv.report.printed import format_corpus

    made = rc.build_corpus(
        args.texts,
        args.tokenizer,
        length=args.length,
        pack=args.pack,
        eos=args.eos,
        separator=args.separator,
        token_dtype=args.token_dtype,
        limit=args.limit,
        populations=args.population,
        progress=progress_bar("tokenize"),
    )
    made_from = made.source["made_from"]
    rc.save_corpus(made, args.output)
    print(format_corpus(made_from["counts"]))
    print(f"→ {args.output}")
    write_json(args.json, made_from)
