"""The contract between the daemon and a worker: messages and their frames.

Both sides import this package and nothing of each other. It is pure: bytes in, messages
out, and back. A change of a message's meaning raises PROTOCOL_VERSION.
"""
