"""What a sweep is asked for, checked before the work, and what decides its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from refcurv.algebra.staircase import cut
from refcurv.curvature.bases import Bases, named, require_bases
from refcurv.curvature.bases_file import spectra_of
from refcurv.curvature.made_from import require_weights
from refcurv.editing.kfac import require_curvature
from refcurv.editing.record import parameter, require_exact, require_untied
from refcurv.evaluation.suite import judged
from refcurv.files import store
from refcurv.files.digest import digest, sha256_of
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    RangeError,
    require_choice,
    require_range,
    require_seed,
)
from refcurv.law.conventions import describe
from refcurv.model.corpus import SPLITS, Corpus, ImagePopulation, Population
from refcurv.model.given import require_corpus, require_list, require_model
from refcurv.model.patterns import expand
from refcurv.model.weights import Model
from refcurv.passes.sweep import lowest_block
from refcurv.sweeps.beside import Collecting
from refcurv.sweeps.methods import METHODS

KINDS: Final[Mapping[str, str]] = MappingProxyType({"perplexity": "text", "forgetting": "recite"})
"""What methods are matched at → the kind of the dev population that says it."""

MATCHES: Final = (*KINDS, "rho")

Readable = Population | ImagePopulation


@dataclass(frozen=True, slots=True)
class Asked:
    """The choices, checked.

    Fields: as of `sweep`; layers, pattern → names, the lowest first; who asks, for messages.
    """

    layers: Mapping[str, tuple[str, ...]]
    rho: tuple[float, ...]
    methods: tuple[str, ...]
    match: str
    on: str | None
    split: str
    seed: int
    who: str = "sweep"

    @property
    def names(self) -> list[str]:
        """Every layer that is edited somewhere."""
        return list(dict.fromkeys(name for names in self.layers.values() for name in names))


def checked(
    model: Model, corpus: Corpus, layers: Sequence[str], rho: Sequence[float],
    names: Sequence[str], match: str, on: str | None, split: str, seed: int, who: str = "sweep",
) -> Asked:  # fmt: skip
    """The choices, each refused before the work if it is bad."""
    require_model(who, model)
    require_corpus(who, corpus)
    layers = _listed(who, "layers", layers, "['blocks.1.mlp.*']")
    rho, names = _listed(who, "rho", rho, "[0.9]"), _listed(who, "methods", names, "['svd']")
    known = list(model.config.linear_layers())
    of = {pattern: tuple(expand(pattern, known)) for pattern in layers}
    for names_of in of.values():
        require_untied(who, model, names_of)
        require_exact(who, model, names_of)
    shares = [require_range(who, "rho", share, 0, 1) for share in rho]
    if edge := [share for share in shares if share in (0, 1)]:
        raise RangeError(f"{who}: rho must lie between 0 and 1; got {edge[0]:g}, which cuts "
                         f"{'nothing' if edge[0] else 'everything'}.")  # fmt: skip
    for name in names:
        require_choice(who, "method", name, METHODS)
    every = dict.fromkeys(name for some in of.values() for name in some)
    _require_weights(who, model, every, names)
    require_choice(who, "match", match, MATCHES)
    require_choice(who, "split", split, SPLITS)
    judged(corpus, split, model)
    if "dev" in {one.split for one in corpus.populations.values()}:
        judged(corpus, "dev", model)
    low = sorted(of, key=lambda pattern: lowest_block(model.config, of[pattern]))
    return Asked(
        MappingProxyType({pattern: of[pattern] for pattern in low}),
        tuple(dict.fromkeys(shares)), tuple(dict.fromkeys(("kfac", *names))), match,
        _matched_on(who, corpus, match, on), split, require_seed(who, seed), who,
    )  # fmt: skip


def _listed(who: str, what: str, given: object, example: str) -> list[Any]:
    """What is to be tried in turn: at least one."""
    found = require_list(who, what, given, example)
    if not found:
        raise ConventionError(f"{who}: {what} must be a list of at least one, as {example}.")
    return found


def _matched_on(who: str, corpus: Corpus, match: str, on: str | None) -> str | None:
    """The dev population that methods are matched on."""
    if match == "rho":
        if on is not None:
            raise ConventionError(f"{who}: at equal rho nothing is matched; leave out on={on!r}.")
        return None
    kind = KINDS[match]
    have = [n for n, p in corpus.populations.items() if p.split == "dev" and p.kind == kind]
    if not have:
        raise EmptyError(
            f"{who}: to match at equal {match} the corpus needs a dev population of kind {kind!r}; "
            "it has none. Give it one, or match at equal rho."
        )
    return have[0] if on is None else require_choice(who, f"the dev {kind}", on, have)


def require_basis(model: Model, basis: Bases, asked: Asked) -> None:
    """Refuse a basis of other weights, or without a layer that is edited."""
    require_bases(asked.who, "the basis", basis)
    missing = [name for name in asked.names if name not in basis]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConventionError(
            f"{asked.who}: {named(basis)} has no {missing[0]!r}{more}. Collect and decompose all "
            "layers that are to be edited."
        )
    require_weights(asked.who, named(basis), basis.weights, model)


def require_mass(basis: Bases, asked: Asked) -> None:
    """Refuse layers that `edit` would refuse in mid-sweep: without curvature, or with noise alone.

    Proof: tests/test_sweep.py::test_a_layer_without_curvature_is_refused_before_the_work
    """
    for name, lam, mu in spectra_of(basis):
        if name in asked.names:
            cut(lam, mu, asked.rho[0], f"{asked.who}: {name!r}")  # it refuses what has no mass
            require_curvature(name, basis[name])


def _require_weights(who: str, model: Model, layers: Iterable[str], names: Iterable[str]) -> None:
    """Refuse weights that are not finite, and for SVD what has no singular direction."""
    for layer in layers:
        name = model.config.weight_of(layer)
        if not parameter(who, model, name).any() and "svd" in names:
            raise EmptyError(
                f"{who}: {name} is all zeros, so that SVD has nothing to keep. Leave {layer!r} out "
                "of --layers, or svd out of the methods."
            )


def facts(
    model: Model, corpus: Corpus, asked: Asked, basis: Bases | None, how: Collecting
) -> dict[str, Any]:
    """What decides the results (FINGERPRINT)."""
    if basis is not None:
        came_from: dict[str, Any] = {"basis": basis_digest(basis, asked.names)}
    else:
        tokens = corpus.tokens if corpus.images is None else corpus.images
        own = [x for x in (tokens, corpus.labels, corpus.mask, corpus.segments) if x is not None]
        came_from = {"collected": {**asdict(how), "from": sha256_of(own)}}
    choices = {name: list(value) if isinstance(value, tuple) else value
               for name, value in asdict(replace(asked, layers={})).items()}  # fmt: skip
    del choices["who"]
    return {
        **choices, "layers": list(asked.layers), "weights": digest(model), "dtype": model.dtype,
        "populations": population_digests(corpus), **came_from, "law": describe(),
        **store.machine(),
    }  # fmt: skip


def basis_digest(basis: Bases, names: Iterable[str]) -> str:
    """What tells the eigenvectors and eigenvalues of these layers from others."""
    of = [basis[name] for name in names]
    return sha256_of([x for one in of for x in (one.U_A, one.mu, one.U_G, one.lam)])


def population_digests(corpus: Corpus) -> dict[str, str]:
    """Name → what tells a population from others."""
    return {name: _population(one) for name, one in corpus.populations.items()}


def _population(one: Readable) -> str:
    if isinstance(one, ImagePopulation):
        return f"{one.kind} {one.split} {sha256_of([one.images, one.labels])[:16]}"
    arrays = [one.tokens, one.prompt_length, one.length]
    return f"{one.kind} {one.split} {sha256_of(arrays)[:16]}"
