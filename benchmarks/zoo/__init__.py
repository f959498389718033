"""Other people's models, and what jbn's tools make of them."""
