"""The worker process: one model, llama.cpp, and a loop of steps.

Started as `python -m shimpy.engine`; nobody imports it. It speaks shimpy.protocol on an
inherited socket and leaves stdout and stderr to llama.cpp's own log.
"""
