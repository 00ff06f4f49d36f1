"""Numbers with a proof: the transformer run over balls (`algebra.balls`).

layers      the layer functions over balls, `BALLS`: the real functions, without their rounding
"""
