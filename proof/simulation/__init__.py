"""Seeded simulation: the real workflow classes run without a server, through everything that can go wrong.

One number decides a whole schedule: the order in which calls act and answer, which answers are lost or late, which
callbacks arrive, when a client cancels, when a worker is killed, what is replayed. Time is virtual, so a task of hours
takes milliseconds, and the same number always gives the same schedule.

    timeline.py        virtual time: what happens next
    fault_schedule.py  what goes wrong, and until when
    scenario.py        one seed's task, payer and clients
    clients.py         what clients, operators and machines do to a task
    hosted_run.py      one workflow run on a worker: activated, replayed, evicted (temporalio's own workflow runner)
    server.py          the runs of one workflow id: messages, resets, continue-as-new, the end
    live_run.py        one run as server and worker play it: workflow tasks, timers, replay
    sdk.py             all that is used of temporalio's private modules, for one version
    history.py         a run's history, and what a reset keeps of it
    timers.py          the timers of one run
    versions.py        what a worker of another release passes to the next run
    calls.py           activities: attempts, retries, time limits, cancellation
    witness.py         what a run received and requested, by Temporal's history
    credits_model.py   the credits service (contract §4), ours and the platform's own
    comfyui_model.py   ComfyUI: what is common to its jobs
    image_jobs.py      ... image jobs (contract §2)
    trainings.py       ... trainings (contract §3)
    store_model.py     the task store (contract §4 earlier lives, §6)
    life_gate.py       the check of the task's row before a call that begins something
    parties.py         which call goes to which model
    oracle.py          invariants 1 to 4, 6 and 7: checked after every step
    ..._rules.py       ... by what the services saw: prices, holds, settlement, jobs, the record
    schedule.py        one seed, from start to end
    mutants.py         known mistakes, put back one at a time
    __main__.py        `python -m proof.simulation`

The models are written from the contract, not from the simulators or the store: otherwise a shared mistake would go
unnoticed.
"""
