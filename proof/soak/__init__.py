"""A soak: thousands of tasks of both kinds on the whole local stack, under random faults, judged from outside.

plan.py       what a soak is told; which task is the nth and when faults come, by its seed
journal.py    the state folder: what must be known to go on after an interruption
site.py       the stack as this process sees it: its doors, its parts, its task table
workload.py   starts tasks, a bounded number open at once, and sees them end
recorder.py   a client of the live streams that remembers every event it was told
faults.py     what goes wrong, one function a kind
weather.py    lets faults happen, and measures how long work takes to go on afterwards
run.py        one session of it
verdict.py    what is true in the end, and the table that says so
"""
