"""Judging: the identities on a user's own model."""
