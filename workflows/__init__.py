"""The step tables as durable, deterministic code: `image_generation.py`, `training.py`, and the mechanisms they name.

No I/O here: that is done by activities (`activities/`). See workflows/ruff.toml for what may not be called.
"""
