"""What a run found, for people: a terminal's table, three plots, one page of HTML."""
