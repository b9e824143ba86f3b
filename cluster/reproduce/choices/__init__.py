"""What the text of section 4.1 leaves open, tried one by one."""
