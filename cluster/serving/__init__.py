"""Trained runs put to use: scoring, predicting, exporting, answering over HTTP."""
