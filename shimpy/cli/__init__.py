"""The command line: one file per command, heavy imports inside it.

Data goes to stdout; progress, hints and errors to stderr. Exit codes: 0 done, 1 failed,
2 used wrongly, 130 interrupted.
"""
