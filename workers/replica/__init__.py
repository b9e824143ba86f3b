"""Model replicas and their concurrent steps."""
