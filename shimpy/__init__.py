"""shimpy: a model manager daemon for GGUF models.

It finds models, decides for each how far its experts stay in RAM, loads and unloads
them on demand and serves them over HTTP. docs/architecture.md is the map.
"""

__version__ = "0.1.0"
