"""Discrete-event simulation of a fleet, and the learning that it judges, on recorded outcomes and arrival traces."""
