"""The planner's decisions, pure: the same code runs live, in tests and in simulation."""
