"""Models as Hugging Face folders: safetensors, tokenizer with chat template, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ogdopt_harness.common.files import replaced, seal
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.modeling.adapters import bare, save


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str, ranks: Ranks = ALONE) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer with chat template, model card), whole or not at all.

    Adapters are merged into its weights, and stand by themselves in `adapter/`. Of a sharded model each tensor is gathered in
    turn, and the first process alone keeps them, in the host's memory.
    """
    weights: Any = None
    if isinstance(bare(model), FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
        weights = {name: value for name, value in weights.items() if name not in twice}  # tied ones are saved once

    def write() -> None:
        with replaced(folder) as temporary:
            save(model, temporary, weights)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            seal(temporary)

    ranks.on_first(write)


def model_card(title: str, base: str, recipe: dict[str, Any], figures: dict[str, float]) -> str:
    """A model card in markdown: what this model is, how it was trained, and what was measured on the way."""
    rows = "\n".join(f"| {k} | {v:.5g} |" for k, v in figures.items())
    return f"""---
library_name: transformers
tags: [ogdopt, preference-tuning]
---
# {title}

Trained from `{base}` with ogdopt. Recipe:

```json
{json.dumps(recipe, indent=2, sort_keys=True, default=str)}
```

| measured | value |
|---|---|
{rows}
"""
