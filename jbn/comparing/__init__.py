"""Two models on the same input: what each layer takes and returns, and where they part."""
