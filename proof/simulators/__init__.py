"""ComfyUI and the credits service as real local HTTP services (contract §2 to §5), with faults that can be switched on.

Each keeps its state in one file of its own, so that a restart loses nothing. docs/simulators.md lists the faults;
`serving.py` runs both inside a test, `python -m proof.simulators credits|comfyui` as processes.
"""
