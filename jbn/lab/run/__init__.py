"""A run: its folder, its processes, what it records and saves, and where its loss went wrong."""
