"""Rows of any source as examples and batches; the miniature world that makes its own."""
