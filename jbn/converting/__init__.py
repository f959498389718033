"""Arrays and options of layers and models from one library into another."""
