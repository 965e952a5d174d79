"""Start, follow, confirm, cancel, show and list tasks: by Temporal, over HTTP, with or without `async`."""
