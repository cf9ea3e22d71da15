"""Llama, and models of its shape."""

from shared.models.families.spec import Family

FAMILY = Family(
    name="llama",
    models="Llama 2 and 3.x, Mistral, SmolLM, TinyLlama",
    paired_rotation=True,  # the converter permutes q and k to suit ggml's rotation of neighbours
    biases="optional",
    sliding_window="all",  # Mistral 7B v0.1
)
