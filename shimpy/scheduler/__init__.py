"""Which models are resident, and where: a pure core, and the shell that starts workers.

`core`, `policy`, `ledger`, `states`, `effects` and `exits` are pure: events, snapshots and
times in, effects out. `scheduler` (the shell), `worker` (a process), `lease` and `mailbox` (one
request's talk with it) do the I/O and decide nothing about residency.
"""
