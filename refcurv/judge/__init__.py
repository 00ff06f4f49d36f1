"""Judging models, edits and other programs.

A user's own model:
    audit       every identity that can be checked on it: identities/, bench, roundings
    controls    an edit beside other cuts of the same size

Another program:
    judgement   `validate`: reads a dump (foreign/), compares, diagnoses
    dump, case, verdict     what theirs holds; beside what it is judged; what is said of it
    arithmetic  budgets from their dtypes
    compare     A and G; draws, drawn: what drawing labels explains of them
    bases, masks, edits     eigenvectors, cuts, edited weights
    corrections EK-FAC's Λ; truths: ours, in their eigenvectors; segments: of what sums it is made
    biases      layers whose dump joins weight and bias
    diagnosis/  which known fault explains it
    injected/   the known faults, put into a truth: for tests of the diagnosis, and for cases/
    trace, divergence       every tensor of a pass, and the first in which theirs differs
    pictures    what a report shows of a layer
    cases/      conformance vectors, for programs in any language
"""
