"""shimpy beside its peers: the same models, prompts and threads, in one interleaved run.

    python -m tests.benchmarks.peers --help

The peers are llama-cpp-python's own server and xllamacpp (llama-server's core); the limit is a
bare loop over llama.cpp's low-level API. The peers' packages are the extra `peers`; they may
live in an environment of their own, whose Python is named by --peers-python. Each contender
serves from a process of its own, all of them idle but the one that is measured.
"""
