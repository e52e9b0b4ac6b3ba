"""Where a model's tensors go: decided from its shape, a hardware snapshot and the options.

`planner` and `memory` are pure; `probe` is the only module here that does I/O.
"""
