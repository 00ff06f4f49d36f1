"""Many edits of one model, by several methods at equal cost; the factors are collected once."""
