"""The actor: draws the rollouts of coming windows from a server, beside the run that trains on them.

    python -m tbrm_trl.actor OUTPUT_DIR --server http://localhost:8000

`rollouts="async"` starts this command as a child of the run; by hand it runs wherever OUTPUT_DIR is seen. It shares no
more than files with the run: it reads the plan and the policy's versions, and writes windows of rollouts.

    plan.py      what the actor needs to know of the run
    drawer.py    one row: prompt, turns, tools, environments, rewards
    server.py    requests to a server under a named version of the policy
    ledger.py    which rows are done, on disk
    work.py      many rows at once, within the bounds
    child.py     the actor as a child process of the run
"""
