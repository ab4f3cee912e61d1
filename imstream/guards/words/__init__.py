"""The word list: loading, normalization, search, and the guard that applies it."""
