"""Everything on one machine: Temporal server, PostgreSQL, simulators, gateway and worker; started, watched, stopped.

folder.py       `.run`: its files, its lock, its secrets, and what it keeps between runs
ports.py        the port of each part: the same as last time if that is free
child.py        one process that ends with its supervisor and is restarted when it dies
privileges.py   what that process does first: tie its life to ours; drop root for PostgreSQL
postgres.py     the local PostgreSQL
temporal_server.py  the local Temporal server
dataset.py      the demo's dataset
own_services.py  services of the user's own, used instead of simulated ones
pace.py         limits that assume the real pace, adapted to a speed
parts.py        the parts, their settings, and when each is ready
supervisor.py   starts the parts in parallel, watches them, ends them
description.py  `.run/stack.json` (contract §8)
background.py   the supervisor as a background process
log_reader.py   the logs of all parts, readable
commands.py     what `make up`, `make down`, `make demo` and `make status` do
"""
