"""Phi-3: fused projections; long-context models rotate by other factors when the context is long."""

from shared.models.families.spec import Family

FAMILY = Family(
    name="phi3",
    models="Phi-3 and 3.5 mini and medium, Phi-4, Phi-4-mini",
    fused_gate_up=True,
    sliding_window="all",
    long_rope=True,
)
