"""Image generation and model training on ComfyUI as durable Temporal workflows."""
