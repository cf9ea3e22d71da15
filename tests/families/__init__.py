"""Tiny models of every family that can be imported, compared with transformers.

`python -m tests.families` prints how far our logits are from the recorded ones; `python -m tests.families.make`
records them anew (see there for what it needs).
"""
