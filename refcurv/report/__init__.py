"""What a run found, for people: a terminal's tables, figures, one page of HTML."""
