"""Filters that flags name by dotted path: for finished groups (dynamic sampling) and for the data buffer."""
