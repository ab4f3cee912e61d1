"""The AI side: what is asked of the model, the client of an OpenAI-compatible backend, and the demo backend."""
