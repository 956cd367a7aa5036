"""A training run on disk: files written whole, read with every field checked, given back bit for bit."""
