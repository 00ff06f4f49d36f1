"""Bugs that are planted into the truth: each makes a case that a harness must reject.

A bug is named by its id in the catalogue of bugs (B1-B82). It changes what a program claims, and
nothing that it was given: rows, weights and corpus stay true.
"""

from refcurv.judge.cases.planted.bug import Bug
from refcurv.judge.cases.planted.network import NETWORK
from refcurv.judge.cases.planted.planting import invalid, needed
from refcurv.judge.cases.planted.spectra import SPECTRA
from refcurv.judge.cases.planted.sums import SUMS

__all__ = ["BUGS", "Bug", "invalid", "needed"]

BUGS: tuple[Bug, ...] = (*SUMS, *SPECTRA, *NETWORK)
"""Every bug that is planted; a suffix of the id tells two forms of one bug apart."""
