"""Every door of ours, every token of ours: what opens, and what is written about it."""
