"""Gemma 3 (text): normalised q and k, five layers with a window to one without, which rotates by a base of its own."""

from shared.models.families.spec import Family

FAMILY = Family(
    name="gemma3",
    models="Gemma 3 270M, 1B, and the text part of 4B, 12B and 27B",
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    scaled_embedding=True,
    sliding_window="alternating",
    window_period=6,
    window_rope_base=10000.0,
    overflows_half=True,
    wide_scale_layers=62,  # the 27B
)
