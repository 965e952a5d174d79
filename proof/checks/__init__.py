"""What must be true of every task that has ended, judged from outside; the same rules for every kind of run.

A judge never relies on what the task reports about itself. It compares that with what the credits service, ComfyUI,
object storage, Temporal and the clients have recorded. Only what a kind of run cannot know is exempt, by name
(`Exempt`).

finished_task.py   the evidence on one task, the rules and the exemptions by their names
judge.py           every rule on one task
money.py           holds, charges and what the task reports of them
price.py           what a completed task costs, by both services
events.py          the event history, and what a client of the live stream received
histories.py       Temporal's histories of the task's runs, and their replay
evidence.py        collects the evidence from a running stack

Used by tests/workflows, the simulation, the kill points and the soak. The simulation also has rules of its own, which
compare each step with what its models saw.
"""
