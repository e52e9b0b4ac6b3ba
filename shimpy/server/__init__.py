"""The daemon's HTTP side: one app, one path for generation, a package per dialect."""
