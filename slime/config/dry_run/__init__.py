"""What --dry-run prints: the plan, and the memory that a device needs by kind."""
