"""Gemma 2: norms after attention and feed-forward too, soft caps, every other layer with a window."""

from shared.models.families.spec import Family

FAMILY = Family(
    name="gemma2",
    models="Gemma 2 2B, 9B and 27B",
    post_norms=True,
    activation="gelu_tanh",
    scaled_embedding=True,
    separate_head=False,
    sliding_window="alternating",
    window_period=2,
    window_default=4096,
    wide_scale_layers=46,  # the 27B; the file does not say it, llama.cpp too tells it by its layers
)
