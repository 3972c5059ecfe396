"""The output of --dry-run: the plan, and the memory that a device needs by kind."""
