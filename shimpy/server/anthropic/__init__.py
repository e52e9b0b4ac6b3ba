"""Anthropic's dialect: /v1/messages, as the SDKs and Claude's own tools know it."""
