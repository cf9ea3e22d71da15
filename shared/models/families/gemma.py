"""Gemma: GELU, scaled embeddings. GGUF stores its norms with the 1 already added."""

from shared.models.families.spec import Family

FAMILY = Family(
    name="gemma", models="Gemma 2B and 7B", activation="gelu_tanh", scaled_embedding=True, separate_head=False
)
