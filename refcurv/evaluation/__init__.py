"""What a model can do: recite, answer, predict. Nothing here depends on how it was edited."""
