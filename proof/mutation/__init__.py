"""Mutants: small mistakes that are put into `workflows/` and `activities/`, to see which of them no test notices.

A mutant is one change of one expression or statement. It is never written to disk: a forked process compiles the
mutated source in place of the module and imports everything that depends on it again. First the simulation judges it,
by the seeds that reach the changed block; then the tests that reach the block judge a survivor. A mutant that survives
both is listed, with its place and its change, unless `harmless.toml` says why it does no harm.

    mutations.py       the possible changes of a module
    changes.py         the small changes of one expression
    in_memory.py       a module with a changed source
    forked.py          a call in a process of its own, with limits of time and memory
    reach.py           which seeds and tests reach which block
    pytest_reach.py    ... as a plugin of pytest
    judging.py         the verdict on one mutant
    verdicts.py        what was judged before
    harmless.py        the survivors that are known, with their reasons
    report.py          the table and the survivors
    __main__.py        `python -m proof.mutation`

mutmut 3.8 and cosmic-ray 8.7 were considered. mutmut leaves out decorated functions (all activities, handlers and
properties), changes the signature of the others and can only judge by pytest. cosmic-ray writes its changes into the
files of the tree and removes no statements.
"""
