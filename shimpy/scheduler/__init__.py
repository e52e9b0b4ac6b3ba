"""Which models are resident, and where: a pure core, and the shell that starts workers.

Pure are `core` (the events), `books` (its state), `placing`, `policy` and `ledger` (who gets
which memory), `states`, `effects`, `exits` and `loads`: events, snapshots and times in, effects
out. `scheduler` (the shell), `worker` (a process), `lease` and `mailbox` (a request's talk with
it) and `reports` do the I/O and decide nothing about residency.
"""
