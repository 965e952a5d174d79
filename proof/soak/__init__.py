"""A soak: thousands of tasks of both kinds on the whole local stack, under random faults, judged from outside.

plan.py            options; the nth task and when faults come, by the seed
journal.py         the state folder: what is needed to resume
site.py            the stack's clients and parts, and the open tasks
workload.py        starts tasks, a bounded number open at once, and waits for their ends
faults.py          what goes wrong, one function for each kind
fault_schedule.py  injects faults, and measures recovery
run.py             one session
verdict.py         the verdict on all tasks, and the table
"""
