"""Ollama's dialect: its routes under /api, byte for byte where clients depend on it."""
