"""What `fxlora demo` trains: a small language model and texts that need no model hub."""
