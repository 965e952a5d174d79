"""Everything on one machine: Temporal server, PostgreSQL, simulators, gateway and worker; started, watched, stopped.

folder.py       `.run`: what lies where, its lock, its secrets, and what it remembers
ports.py        where each part listens: the same place as last time where that is free
child.py        one process that ends with its parent, whose death is noticed and mended
privileges.py   what that process does first: tie its life to ours; lay root down for PostgreSQL
postgres.py     the local PostgreSQL
temporal_server.py  the local Temporal server
pace.py         what a speed means for the limits that assume the real pace
parts.py        which parts there are, with which settings, and when each is ready
supervisor.py   starts the parts side by side, watches them, ends them
description.py  `.run/stack.json` (contract §8)
background.py   the supervisor in the background of a command
commands.py     what `make up`, `make down`, `make demo` and `make status` do
"""
