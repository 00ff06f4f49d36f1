"""Which files a certificate is of: only those whose numbers were certified."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refcurv.files import store
from refcurv.files.corpus import load_corpus
from refcurv.files.weights import load
from refcurv.law.checks import Array
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model

OF_CORPUS = ("tokens", "labels", "mask", "segments", "images")
"""What numbers are made from. Populations are not."""


def files_of(model: Model, parameters: Mapping[str, Array], corpus: Corpus) -> dict[str, str]:
    """{file name: SHA-256} of the model's and the corpus's file, as far as these are in memory.

    A model that was loaded in float32 from float64, or changed since, is not its file. Neither is a
    corpus with other tokens. Such files are left out: a certificate would be false of them.

    Proof: tests/test_certified_hostile.py::test_a_certificate_names_only_files_that_it_is_of
    """
    sources = []
    if "path" in model.source:
        file = load(model.source["path"])
        same = (np.array_equal(x, file.parameters[name]) for name, x in parameters.items())
        if file.config == model.config and all(same):
            sources.append(model.source)
    if "path" in corpus.source:
        held = load_corpus(corpus.source["path"])
        if all(_same(getattr(held, name), getattr(corpus, name)) for name in OF_CORPUS):
            sources.append(corpus.source)
    return store.inputs(*sources)


def _same(one: Array | None, two: Array | None) -> bool:
    if one is None or two is None:
        return one is two
    return np.array_equal(one, two)
