"""Checks of a set-up, and of its ledger, before and while it spends credits."""
