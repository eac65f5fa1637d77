"""What comes out of a run, and what is done with it."""
