"""Kill points: the real stack, struck at every point of both flows, judged from outside.

A round is one kind of blow: a task is brought to each point and kept there, all side by side; then the blow falls
once, what was struck comes back, and every task has to end as if nothing had been.

points.py      every point of both flows, and how a task is brought to it
paths.py          the lives of a task that lead there
gates.py         how a call is kept in its point: files that the worker looks at
shorter_waits.py waits of minutes that the rounds have no time for
gated_worker.py  `worker.py` with these gates; nothing of it is in production code
kinds.py         the blows
stack.py         the stack's processes, each ours to kill and to start again
site.py          the stack as this process sees it: its doors and its books
recorder.py      a client of the live streams
rounds.py        one round from start to verdict
oracle.py        what must be true of each task in the end
report.py        the table
"""
