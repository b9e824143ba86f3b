"""Pure rules: updates, schedules, staleness policies, BN statistics."""
