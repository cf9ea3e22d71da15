"""Records what transformers computes: `python -m tests.families.make`.

Needs torch and transformers, in an environment of its own (they are of no use to the tests themselves):

    python3 -m venv ../reference
    ../reference/bin/pip install "torch==2.13.0" "transformers==4.57.6" sentencepiece protobuf tiktoken -e ".[cpu]"
    ../reference/bin/python -m tests.families.make

Writes tests/golden/families/: an .npz per tiny model (logits of every position in fp32, and a hash of the weights,
which come from a seed), and a .json per tokenizer (a small vocabulary, texts and their ids).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.families.cases import CASES, Case, Floats, fingerprint, weights
from tests.families.logits import GOLDEN
from tests.families.make_tokenizers import make as make_tokenizers


def transformers_logits(case: Case, *, cached: bool = False) -> Floats:
    """Logits [tokens, vocab] of transformers' implementation in fp32, read at once or token by token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.model_type, **case.settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    state = {name: torch.from_numpy(value) for name, value in weights(case).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    if missing:
        model.tie_weights()
    ids = torch.tensor([case.ids])
    with torch.no_grad():
        if not cached:
            return np.asarray(model(ids, use_cache=False).logits[0].numpy(), np.float32)
        past: Any = None
        rows = []
        for place in range(case.tokens):
            out = model(ids[:, place : place + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, -1].numpy())
    return np.asarray(np.stack(rows), np.float32)


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        np.savez_compressed(
            GOLDEN / f"{case.name}.npz",
            logits=transformers_logits(case),
            weights_sha256=np.array(fingerprint(weights(case))),
        )
        print(case.name)
    make_tokenizers()


if __name__ == "__main__":
    main()
