"""xllamacpp's HTTP server; run by the peers' Python.

Reads its settings as JSON from the command line, prints its URL, and ends with its input.
"""

from __future__ import annotations

import json
import sys

import xllamacpp

given = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = given["path"]
params.n_ctx = given["n_ctx"]
params.n_parallel = given["n_slots"]
params.n_batch = params.n_ubatch = 512
params.kv_unified = True
params.cpuparams.n_threads = given["n_threads"]
params.cpuparams_batch.n_threads = given["n_threads"]
params.no_extra_bufts = True
params.fit_params = False
params.n_gpu_layers = 0
params.verbosity = -1
params.embedding = given["embeds"]
# Prompts of one run never come again in another.
params.cache_ram_mib = 0
params.hostnames = ["127.0.0.1"]
params.port = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
