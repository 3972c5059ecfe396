"""The output of --dry-run: the plan, and a device's memory by kind."""
