"""Checks that need a GPU: `make test-gpu`, or `python -m tests.gpu [NAME ...]`. Nothing here is collected by pytest."""
