"""Second moments of a layer's inputs and output gradients, and the basis they define."""
