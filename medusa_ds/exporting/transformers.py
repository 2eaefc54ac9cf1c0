"""Plain transformers: the heads in our own layout and a file of code beside them."""

import inspect
from pathlib import Path

from medusa_ds.decoding import pace
from medusa_ds.exporting import custom_generate
from medusa_ds.exporting.source import Files, Source
from medusa_ds.model import rope

KINDS: tuple[str, ...] = ("medusa", "hydra")


def files(source: Source) -> Files:
    """What it reads."""
    return {"custom_generate/generate.py": _copy_code}


def _copy_code(target: Path) -> None:
    """The file with the two modules of ours that it imports in their place, so that it needs none of this package."""
    text = inspect.getsource(custom_generate)
    for module in (pace, rope):
        _, _, body = inspect.getsource(module).split('"""', 2)
        before, _, after = text.partition(f"from {module.__name__} import ")
        text = before + body.strip() + after[after.index("\n") :]
    target.write_text(text, encoding="utf-8")


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
chat = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(
    **inputs, max_new_tokens=256, do_sample=False,
    custom_generate="{out}", medusa_heads="{out}", trust_remote_code=True,
)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
