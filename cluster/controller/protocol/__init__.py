"""What the controller and a backend say to each other: events in, instructions out."""
