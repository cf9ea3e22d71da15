"""Qwen2: llama with biases on q, k and v."""

from shared.models.families.spec import Family

FAMILY = Family(name="qwen2", models="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", biases="qkv")
