"""A running stack as kill points, soak and benchmarks see it, and their means to start one.

site.py      clients: Temporal, gateway, the simulators' admin pages, the task store
parts.py     the stack's processes: start, kill, restart
waiting.py   waiting for a condition while parts of the stack are away
recorder.py  a client of the live streams
callbacks.py signed callbacks, as ComfyUI sends them
"""
