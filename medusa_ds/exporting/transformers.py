"""Plain transformers: the heads in our own layout and a file of code beside them."""

import inspect
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from medusa_ds.config.recipe import ModelSpec
from medusa_ds.decoding import capture, pace
from medusa_ds.exporting import custom_generate
from medusa_ds.exporting.source import Source
from medusa_ds.model import rope
from medusa_ds.model.backbone import load_config, without_hub
from medusa_ds.model.facts import Asked, build_twin


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads."""
    if why := source.beyond("medusa", "hydra", bias=True):
        return why
    if decodes(ModelSpec.model_validate(source.recipe["model"])):
        return None
    return "found a base model whose `generate` cannot take guesses back, which it does not run"


def decodes(spec: ModelSpec) -> bool:
    """Whether a twin of a base model writes its own text with guesses too; true where it cannot be asked."""
    ids = torch.tensor([[7, 20, 9]])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "use_cache": True}
    settings |= {"do_sample": False, "pad_token_id": 0}
    with suppress(Exception):  # whatever a model may raise that is not here, or from which nothing is generated
        twin: Any = build_twin(Asked(load_config(without_hub(spec)), spec.attention, spec.trust_remote_code))
        twin.generation_config.eos_token_id = None
        wanted = twin.generate(ids, **settings)
        heads = SimpleNamespace(
            lm_head=twin.get_output_embeddings(),
            pace=lambda *_: pace.Pace(range(3), [0.9, 0.9]),
            guess=lambda _, token, number: token.new_zeros(len(token), number),
        )
        try:
            found = twin.generate(ids, custom_generate=partial(custom_generate.decode, heads=heads), **settings)
        except Exception:  # as above: a cache of another kind, or one that cannot be cropped
            return False
        return bool(wanted.equal(found))
    return True


def write(source: Source, directory: Path) -> None:
    """Write the file with the three modules of ours that it imports in their place: it needs no more of ours."""
    text = inspect.getsource(custom_generate)
    for module in (pace, rope, capture):
        _, _, body = inspect.getsource(module).split('"""', 2)
        before, _, after = text.partition(f"from {module.__name__} import ")
        text = before + body.strip() + after[after.index("\n") :]
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(text, encoding="utf-8")


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
chat = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(
    **inputs, max_new_tokens=256, do_sample=False, use_cache=True,
    custom_generate="{out}", medusa_heads="{out}", trust_remote_code=True,
)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
