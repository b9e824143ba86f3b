"""What a run is told: its configuration, the options made of it, the recipes."""
