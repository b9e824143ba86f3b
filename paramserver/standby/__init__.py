"""Followers: a second copy of a partition that can take its place."""
