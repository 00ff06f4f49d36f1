"""The paper on a model and a corpus that ship with the package."""
