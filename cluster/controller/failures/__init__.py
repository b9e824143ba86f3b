"""What is done about a failure, and the account of failures. Pure."""
