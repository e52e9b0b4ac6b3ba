"""The daemon's HTTP side: one app, one path for generation, a package per dialect.

`daemon.serve` composes everything; `app` gathers the routes; `generation` is the one path
that text takes whatever the dialect; a dialect is a `wire` file (bytes to values and back,
no I/O) and a `routes` file. aiohttp is known here and nowhere else.
"""
