"""Numbers with a proof: the transformer run over balls (`algebra.balls`).

certify            `certify`: what is asked for, and as many bits as it takes
attempt            one certificate: balls, and beside them what floats give
planning           how many bits
estimate           before the work: seconds and memory, and what would fit
cuts               the cut of the real numbers and W': what is proved of pairs
certificate        `Certificate` and `Enclosed`: numbers, each with a radius that is proved
certificate_file   certificates on disk
numbers            what is certified, on any kind of number: balls, float64, float32, longdouble
blocks             dense Hessian, GGN and Fisher of small weights, on any kind of number
layers             the layer functions over balls, `BALLS`: the real functions, without rounding
labels             SAMPLING: the labels that float64 draws, and whether the real numbers do too
directions         the direction of products: signs, or one's own
lost               the operation or layer where balls lose what they know
spectra            eigenvalues of A and G, the cut and W', and what float64 makes of them
"""
