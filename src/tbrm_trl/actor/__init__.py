"""The actor: draws the rollouts of the next windows from a server while the run trains.

    python -m tbrm_trl.actor OUTPUT_DIR --server http://localhost:8000

`rollouts="async"` starts this command as a child of the run. Started by hand, it runs on any machine that sees
OUTPUT_DIR. It shares only files with the run: it reads the plan and the policy's versions, and writes windows of
rollouts.

    plan.py      what the actor needs to know about the run
    drawer.py    one row: prompt, turns, tools, environments, rewards
    server.py    requests to a server under a named version of the policy
    ledger.py    which rows are done, on disk
    work.py      draws many rows at once, within the bounds
    child.py     the actor as a child process of the run
"""
