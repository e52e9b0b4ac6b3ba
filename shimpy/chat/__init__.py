"""Conversations as text: templates that render them, parsers that read the answer. Pure."""
