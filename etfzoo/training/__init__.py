"""A run from its config: protocols, schedules, the loop, search, transfer, publishing."""
