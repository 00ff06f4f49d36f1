"""Edits of weight matrices: which directions to keep, and the projection onto them."""
