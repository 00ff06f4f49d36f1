"""Which known fault explains what does not agree.

Read in this order:
    faults      the names: every known fault and what to change
    procedure   `diagnose`: the order in which hypotheses are tried
    search      the fewest faults that are enough
    ladders     how far one side of a layer may be off
    telling     causes, what was excluded, and the findings with their causes; causes, their words

What is tried:
    seen        one side of a layer: theirs, ours, and what a hypothesis leaves
    looking     what needs no model, tried on each layer:
    hypotheses, others  other order, damping, a missing mean; other layers
    recomputed  what model and corpus make: A and G under other settings (variants/), by these:
    deciding, work, compared    what of a setting decides a side; what is too much work; what a
                setting makes, beside theirs
    amounts, fits   amounts in the loss by least squares; eps and the like by a search
    weighted    weights of batches and sequences, by least squares
    unknown, dropped    labels that nobody knows; a pass with dropout: by tests
    replayed, relabelled    averages, weights and other labels that drawing hides: by dumps of each
    scales, factors     factors of A and G, and counts; which of them drawing allows
    precision   the size of a coarser arithmetic
    signs       what a matrix shows by itself

Of what is made from A and G:
    bases, rules, cuts, corrections     why eigenvectors, shares, masks or Λ are not ours
"""
