"""Which files a certificate is of: only those whose numbers were certified."""

from __future__ import annotations

from collections.abc import Mapping

from refcurv.files import store
from refcurv.files.weights import holds
from refcurv.law.checks import Array
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model

OF_CORPUS = ("tokens", "labels", "mask", "segments", "images")
"""What numbers are made from. Populations are not."""


def files_of(model: Model, parameters: Mapping[str, Array], corpus: Corpus) -> dict[str, str]:
    """{file name: SHA-256} of the model's and the corpus's file, as far as these are in memory.

    A model that was loaded in float32 from float64, or changed since, is not its file. Neither is a
    corpus with other tokens. Such files are left out: a certificate would be false of them. What is
    in memory is compared with the checksums of the file's datasets, which are not read again.

    Proof: tests/test_certified_hostile.py::test_a_certificate_names_only_files_that_it_is_of
    """
    sources = []
    if "header" in model.source and holds(model.source["header"], model.config, parameters):
        sources.append(model.source)
    if "header" in corpus.source:
        header = corpus.source["header"]
        if all(store.holds(header, name, getattr(corpus, name)) for name in OF_CORPUS):
            sources.append(corpus.source)
    return store.inputs(*sources)
