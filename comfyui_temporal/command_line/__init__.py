"""The command line and the functions behind it; `starter.py` is its entry point and publishes what others import."""
