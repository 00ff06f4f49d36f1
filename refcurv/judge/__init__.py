"""Judging: the identities on a user's own model; an edit beside other cuts."""
