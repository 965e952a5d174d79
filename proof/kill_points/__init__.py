"""Kill points: a fault hits the real stack at every point of both flows, and every task is judged from outside.

A round is one kind of fault. One task for each point is brought to it and kept there, all in parallel. Then the fault
is injected once, what failed comes back, and every task must end as if nothing had happened.

points.py         every point of both flows, and the path that leads to it
paths.py          what happens to a task on the way
gates.py          how a call is kept at its point: files that the worker reads
shorter_waits.py  waits of minutes, made shorter for the rounds
gated_worker.py   `worker.py` with these gates; none of it is in production code
kinds.py          the kinds of fault
stack.py          the stack, as processes that this one kills and starts
site.py           the stack's clients, and reads that waiting tasks share
rounds.py         one round from start to verdict
oracle.py         the verdict on each task
report.py         the table
"""
