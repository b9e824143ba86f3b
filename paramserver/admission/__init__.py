"""Who may begin a step: permits, bounded staleness, synchronous rounds."""
