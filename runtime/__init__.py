"""What every entry point reads first: settings, logs, tokens, how a process ends."""
