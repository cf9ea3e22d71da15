"""Discrete-event simulation of a fleet in virtual time, against the planner's own decision core."""
