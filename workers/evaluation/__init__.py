"""Scoring and predicting with trained weights."""
