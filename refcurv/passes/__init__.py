"""Where model and corpus meet: forward and backward over shards, on the fast layer functions."""
