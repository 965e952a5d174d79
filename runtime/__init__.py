"""What every entry point reads first: settings, logs, tokens, the Temporal connection, health pages."""
