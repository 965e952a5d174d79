"""What crosses a wire: pydantic models, enums, error codes, prices and permissions.

Imports nothing of ours, so that every other package may import it, and does no work at import beyond building
models, since workflow code uses it as well.
"""
