"""What the command line runs: data, models, training, figures. Nothing in the library imports it."""
