"""OpenAI's Responses API: conversations as items, and answers as typed events."""
