"""shimpy's own routes: what Ollama's dialect has no words for."""
