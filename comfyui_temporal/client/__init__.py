"""Start, follow, confirm, cancel, show and list tasks."""
