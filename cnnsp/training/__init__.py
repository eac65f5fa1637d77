"""A run: its recipe, its steps, and what survives a stop."""
