"""Which known fault explains what does not agree.

Read in this order:
    faults      the names: every known fault and what to change
    procedure   `diagnose`: the order in which hypotheses are tried, and the causes that come of it
    search      the fewest faults that are enough
    hypotheses  what needs no model: other layers, other order, damping, a missing mean
    scales      factors of A and G, and counts
    precision   the size of a coarser arithmetic
    recomputed  what model and corpus make: A and G under other settings (variants/)
    weighted    weights of batches and sequences, by least squares
    signs       what a matrix shows by itself
"""
