"""Configuration of a run, the command-line options made from it, recipes, and placement."""
