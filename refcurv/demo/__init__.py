"""The paper on a model and a corpus that ship with the package: the two files and their settings.

`model.h5` is a small Qwen 3 trained with this package's own backward by
validation/paper/train.py; `corpus.h5` holds a fresh sample of its training mixture for the factors,
and the populations that it is judged on. Layers and rho were tuned on the `dev` split (the sweep of
validation/paper/lm.py); the table reports the `test` split.
"""

from pathlib import Path
from types import MappingProxyType

from refcurv.pipeline import Job

HERE = Path(__file__).parent
MODEL, CORPUS = HERE / "model.h5", HERE / "corpus.h5"

COLLECTED = "blocks.*.mlp.*"
"""What it collects factors of: the bands are shown for every MLP projection."""

LAYERS = "blocks.3.mlp.{gate,up}"
"""What it edits: gate and up of the last block."""

RHO = 0.83
"""The share of curvature mass that it keeps."""

JOB = Job(weights=MODEL, corpus=CORPUS, layers=COLLECTED, rho=MappingProxyType({LAYERS: RHO}))
"""What `refcurv demo` does."""
