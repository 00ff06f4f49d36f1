"""Numbers with a proof: the transformer run over balls (`algebra.balls`).

certify            `certify`: how many bits, which sequences, and what floats give beside it
cuts               the cut of the real numbers and W': what is proved of pairs
certificate        `Certificate` and `Enclosed`: numbers, each with a radius that is proved
certificate_file   certificates on disk
layers             the layer functions over balls, `BALLS`: the real functions, without rounding
numbers            what is certified, on any kind of number: balls, float64, float32, longdouble
spectra            eigenvalues of A and G, the cut and W', and what float64 makes of them
"""
