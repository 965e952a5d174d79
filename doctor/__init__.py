"""Checks of a set-up and of the books, before and while it costs money."""
