"""The step tables as durable, deterministic code: `image_generation.py`, `training.py`, and the mechanisms they name.

Nothing here touches the world: activities do (`activities/`). See workflows/ruff.toml for what may not be called.
"""
