"""What crosses a wire: pydantic models, enums, error codes, prices and permissions.

It imports no other package of ours, so that all of them may import it. Importing it only builds models, since workflow
code uses it too.
"""
