"""The files that the parts need, made by refcurv's commands, each once and under its recipe's name.

They lie in a folder outside the repository. What each cost is a line of the part "steps".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

import refcurv as rc
from refcurv.cli import main as refcurv
from refcurv.files.disk import write_json_lines
from refcurv.files.whole_texts import read_texts
from refcurv.model.patterns import expand
from validation.bench.measuring import measured, tell
from validation.real import fetch, sets, small, texts
from validation.real.plan import JUDGED, RECITED, SMALL, Plan, Record, short
from validation.real.results import Results, plain

DTYPE = ("--dtype", "float32")
"""The weights are float32 at most: their quantisation is far coarser."""


def command(*words: str | Path) -> None:
    """One command of refcurv; SystemExit where it fails."""
    told = [str(word) for word in words]
    tell(f"refcurv {' '.join(told)}")
    if status := refcurv(told):
        raise SystemExit(status)


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one plan."""

    plan: Plan
    folder: Path
    results: Results

    # -------------------------------------------------------------- what others made

    @property
    def gguf(self) -> Path | None:
        """The model as it was fetched; None for the small one."""
        if self.plan.model == SMALL:
            return None
        models = self.folder / "models"
        models.mkdir(parents=True, exist_ok=True)
        return fetch.fetch(fetch.MODELS[self.plan.model], models)

    @property
    def tokenizer(self) -> tuple[str | Path, ...]:
        """The words that name it."""
        return () if self.gguf is None else ("--tokenizer", self.gguf)

    def text(self, name: str) -> Path:
        """A file of documents."""
        folder = self.folder / "texts"
        if not (folder / f"{name}.jsonl").exists():
            if self.plan.model == SMALL:
                small.texts(folder)
            elif texts.main([str(folder)]):
                raise SystemExit(1)
        return folder / f"{name}.jsonl"

    def populations(self) -> list[str]:
        """The words that tell `refcurv corpus` of the tasks."""
        folder = self.folder / "tasks"
        if self.plan.model == SMALL:
            small.tasks(folder)
        else:
            sets.main([str(folder)])
        return (folder / "populations").read_text().split()

    # -------------------------------------------------------------- what refcurv makes

    def _path(self, step: str, end: str, recipe: Record) -> Path:
        """Where a step's file of a recipe lies."""
        return self.folder / f"{self.plan.model}-{step}-{short(recipe)}{end}"

    def made(
        self, step: str, end: str, recipe: Record, make: Callable[[Path], object], what: str = ""
    ) -> Path:
        """A file under its recipe's name; made now if it is not there, and its costs kept."""
        path = self._path(step, end, recipe)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            cost: Record = {}
            with measured(cost, "it"):
                make(path)
            found = {"what": what, "bytes": path.stat().st_size}
            self.results.keep("steps", f"{step} {what}".strip(), recipe, cost["it"], found)
        return path

    def weights(self) -> Path:
        """The model's weights."""
        gguf = self.gguf

        def make(path: Path) -> None:
            if gguf is None:
                small.weights(path)
            else:
                command("convert", gguf, path)

        return self.made("convert", ".h5", self.plan.recipe(), make)

    def searched(self) -> tuple[Path, ...]:
        """The texts in which passages are looked for: of the Bible so many chapters, evenly."""
        lines = self.text("bible").read_text(encoding="utf-8").splitlines(keepends=True)
        at = np.linspace(0, len(lines) - 1, min(self.plan.chapters, len(lines))).astype(int)
        path = self.folder / f"{self.plan.model}-bible.jsonl"
        path.write_text("".join(lines[n] for n in at), encoding="utf-8")
        return self.text("licences"), path, self.text("state")

    def recited(self) -> Path:
        """The passages that the model recites; those that results/ has are not searched again."""
        plan, weights, searched = self.plan, self.weights(), self.searched()
        recipe = plan.recipe(*RECITED)
        path = self._path("recite", ".jsonl", recipe)
        known = self.results.find("models", "recited")
        if known and not path.exists() and plain(recipe).items() <= known["inputs"].items():
            write_json_lines(self._spelled(known["found"]["passages"]), path)
            return path
        options = {"prefix": plan.prefix, "suffix": plan.suffix, "stride": plan.stride,
                   "run": plan.least}  # fmt: skip
        words = [word for name, n in options.items() for word in (f"--{name}", str(n))]

        def make(path: Path) -> None:
            command("recite", weights, *searched, *self.tokenizer, *DTYPE, *words, "-o", path)

        return self.made("recite", ".jsonl", recipe, make)

    def _spelled(self, passages: list[Record]) -> Iterator[Record]:
        """The ids of passages, as `refcurv recite` writes them, from where they stand."""
        texts = read_texts(self.searched(), self.gguf)
        ids = dict(zip(texts.names, texts.documents, strict=True))
        for one in passages:
            end = one["token"] + one["prompt"] - len(texts.before)
            some = ids[one["document"]]
            yield {
                **{key: one[key] for key in ("document", "token", "split")},
                "prefix_ids": [*texts.before, *some[one["token"] : end].tolist()],
                "suffix_ids": some[end : end + one["said"]].tolist(),
            }

    def tasks(self) -> Path:
        """Every set, all of its items."""
        words = self.populations()

        def make(path: Path) -> None:
            command("corpus", *self.tokenizer, "-o", path, *words)

        return self.made("tasks", ".h5", self.plan.recipe("sets"), make)

    def able(self) -> tuple[Path, Path]:
        """The test items that the model gets right, and its accuracies on test and on dev.

        Of test they lie beside the items, and are written before.
        """
        weights, tasks = self.weights(), self.tasks()
        recipe = self.plan.recipe("sets")

        def dev(path: Path) -> None:
            command("evaluate", weights, tasks, *DTYPE, "--split", "dev", "--json", path)

        def test(path: Path) -> None:
            table = path.with_suffix(".json")
            command("evaluate", weights, tasks, *DTYPE, "--right", path, "--json", table)

        on_dev = self.made("evaluate-dev", ".json", recipe, dev, "tasks, dev")
        right = self.made("evaluate", ".h5", recipe, test, "tasks, test")
        return right, on_dev

    def calibration(self, k: int, tokens: int) -> Path:
        """So many tokens of one calibration text."""
        text, recipe = self.text(f"calibration_{k}"), self.plan.recipe("texts")

        def make(path: Path) -> None:
            command("corpus", text, *self.tokenizer, "--pack", "--limit", str(tokens), "-o", path)

        return self.made(f"tokens-{k}", ".h5", recipe | {"tokens": tokens}, make, f"{tokens:,}")

    def basis(self, k: int, layers: str, tokens: int) -> Path:
        """The basis of some layers from so many tokens of one calibration text."""
        weights, corpus = self.weights(), self.calibration(k, tokens)
        recipe = self.plan.recipe("texts") | {"k": k, "layers": layers, "tokens": tokens}
        count = len(expand(layers, list(rc.load(weights).config.linear_layers())))
        what = f"{count} matrices, {tokens:,} tokens of calibration {k}"

        def collect(path: Path) -> None:
            command("collect", weights, corpus, "-o", path, "--layers", layers, *DTYPE)

        def decompose(path: Path) -> None:
            command("decompose", factors, "-o", path, *DTYPE)

        end = f"-{k}.h5"
        basis = self._path("decompose", end, recipe)
        if not basis.exists():
            factors = self.made("collect", end, recipe, collect, what)
            self.made("decompose", end, recipe, decompose, what)
            factors.unlink()  # the basis is all that is needed, and they are as large
        return basis

    # -------------------------------------------------------------- what is judged

    def clean(self, split: str) -> rc.Population:
        """So many tokens of clean text, each document a row."""
        limit = self.plan.clean[split == "test"]
        tokenizer = None if self.gguf is None else self.gguf
        rows = rc.build_corpus([self.text(f"clean_{split}")], tokenizer, limit=limit)
        real = np.ones_like(rows.tokens) if rows.mask is None else rows.mask
        length = real.sum(axis=1).astype(np.int32)
        more = length > 1  # a document that the limit cut behind its first token asks for nothing
        return rc.Population(
            rows.tokens[more], np.ones(more.sum(), np.int32), length[more], "text", split
        )

    def dev(self) -> rc.Corpus:
        """What chooses: clean text and recited passages."""
        pairs = f"recited_dev:recite:dev={self.recited()}"
        found = rc.build_corpus([], populations=[pairs])
        populations = {"clean_dev": self.clean("dev"), **found.populations}
        return replace(found, populations=MappingProxyType(populations))

    def judged(self) -> rc.Corpus:
        """The same, and all that reports: passages, clean text, the control, tasks."""

        def make(path: Path) -> None:
            pairs = f"recited_test:recite:test={self.recited()}"
            tasks = rc.load_corpus(self.able()[0]).populations
            model, clean = rc.load(self.weights(), dtype="float32"), self.clean("test")
            long = np.flatnonzero(clean.length >= self.plan.prefix)[: self.plan.own]
            some = rc.Population(clean.tokens[long], clean.prompt_length[long],
                                 clean.length[long], "text", "test")  # fmt: skip
            own = rc.own_continuations(model, some, prompt=self.plan.prefix, count=self.plan.suffix)
            found = {
                **self.dev().populations, "clean_test": clean,
                **rc.build_corpus([], populations=[pairs]).populations, "own_test": own,
                **{name: one for name, one in tasks.items() if one.split == "test"},
            }  # fmt: skip
            rc.save_corpus(rc.Corpus(clean.tokens[:0], populations=found), path)

        self.able(), self.recited()  # their costs are their own
        return rc.load_corpus(self.made("judged", ".h5", self.plan.recipe(*JUDGED), make))

    def passages(self) -> list[Record]:
        """Where each passage stands, and how long it is; no text."""
        lines = [json.loads(x) for x in self.recited().read_text(encoding="utf-8").splitlines()]
        return [
            {"document": one["document"], "token": one["token"], "split": one["split"],
             "prompt": len(one["prefix_ids"]), "said": len(one["suffix_ids"])} for one in lines
        ]  # fmt: skip
