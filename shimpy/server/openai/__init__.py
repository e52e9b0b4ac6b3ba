"""OpenAI's dialect: its routes under /v1, with Ollama's and llama.cpp's additions to it."""
