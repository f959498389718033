"""A run: its folder, its processes, what it records and saves, and the loop over its steps."""
