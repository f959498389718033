"""What the layers of a model see in a run, and what follows from it: new statistics, a diagnosis."""
