"""What every server of `/comfyui/v1` must do (contract §1, §2, §3, §7), as cases for any such server.

The same cases run on the simulator, the bridge and a customer's own platform:

    async with opened(base_url, tokens, clients, profile, receiver) as subject:
        for outcome in await run(cases(), subject): ...

A case passes, finds a route *not offered* (which contract §2 allows for some), or is broken, with a sentence that says
what was expected and what was received. Cases marked `changes_nothing` leave no trace: `starter.py doctor` runs them.

`receiving` is imported from `proof.conformance.receiver`, because it needs a web server and `doctor` does not.
"""

from proof.conformance.cases import Case, Outcome, Verdict, cases, outcome_of, run
from proof.conformance.subject import Person, Profile, Subject, TokenMaker, Unreachable, opened

__all__ = [
    "Case",
    "Outcome",
    "Person",
    "Profile",
    "Subject",
    "TokenMaker",
    "Unreachable",
    "Verdict",
    "cases",
    "opened",
    "outcome_of",
    "run",
]
