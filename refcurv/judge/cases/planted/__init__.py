"""Bugs that are planted into the truth: each makes a case that a harness must reject.

A bug is a fault that `judge.injected` puts into a truth, named by its id in the catalogue of bugs
(B1-B82). It changes what a program claims, and nothing that it was given: rows, weights and corpus
stay true.
"""

from refcurv.judge.cases.planted.bugs import BUGS, Bug
from refcurv.judge.cases.planted.planting import invalid, needed

__all__ = ["BUGS", "Bug", "invalid", "needed"]
