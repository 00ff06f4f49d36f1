"""What a model still does: recites, answers, predicts; knows nothing of edits."""
