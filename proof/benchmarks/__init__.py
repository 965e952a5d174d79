"""What the system costs and how fast it is, measured on real servers; `python -m proof.benchmarks` runs all of it.

servers.py           Temporal and PostgreSQL on files, and workers as processes
party.py             ComfyUI and credits for measurements: answers at once, calls back five times
contestants.py       the same job three ways: ours, a bare Temporal workflow, DBOS
bare_worker.py       the bare workflow and its worker
dbos_worker.py       the DBOS workflow and its process
throughput.py        tasks a second: the three compared; ours by open tasks and by workers
whole_stack.py       on the whole local stack: callback to client, start to credits held, recovery after a kill
history_cost.py      history events and billable actions of a task
memory.py            memory per open task and open stream
results.py           the table and the JSON file
burst.py, open_task_memory.py, store_reads.py, stream_memory.py   measurements of their own
"""
