"""Mutants: small mistakes made in `workflows/` and `activities/` by machine, to see which of them go unnoticed.

A mutant is one change of one expression or statement. It is never written to disk: a forked process compiles the
mutated source in place of the module and imports everything that depends on it again. First the simulation judges it,
by the seeds that reach the changed block; a survivor is judged by the tests that reach it. A mutant that survives both
is listed, with its place and its change, unless `harmless.toml` says why it does no harm.

    mutations.py       which changes there are in a module
    changes.py         the small changes of one expression
    in_memory.py       a module with another source than its file's
    forked.py          a call in a process of its own, with limits of time and memory
    reach.py           which seeds and tests reach which block
    pytest_reach.py    ... as a plugin of pytest
    judging.py         the verdict on one mutant
    verdicts.py        what was judged before
    harmless.py        the survivors that are known, with their reasons
    report.py          the table and the survivors
    __main__.py        `python -m proof.mutation`

mutmut 3.8 and cosmic-ray 8.7 were looked at. mutmut leaves out decorated functions (all activities, handlers and
properties), gives the others another signature and knows pytest alone as a judge. cosmic-ray writes its changes into
the files of the tree and removes no statements.
"""
