"""How a decoder is cut into shards and how their activations are joined. Imports nothing of runtime."""
