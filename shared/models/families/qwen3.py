"""Qwen3: q and k are normalised per head, whose size need not be hidden / heads."""

from shared.models.families.spec import Family

FAMILY = Family(name="qwen3", models="Qwen3 0.6B to 32B", qk_norm=True)
