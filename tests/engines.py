"""How engines load a directory of Medusa heads, written down from their sources; each returns logits per head.

FasterDecoding/Medusa `medusa/model/medusa_model.py`, TGI `layers/speculative.py` and `layers/medusa.py`, TensorRT-LLM
`models/medusa/config.py` and `weight.py`, vLLM `transformers_utils/configs/medusa.py` and `models/medusa.py`. Only what
decides about files, keys, shapes and configs is kept; tensor parallelism, quantisation and CUDA are not.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class MedusaResBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + silu(self.linear(x))


def fasterdecoding(path: Path, hidden: Tensor, base_lm_head: Tensor) -> Tensor:
    """`MedusaModelABC.from_pretrained`, `strict=False`: five heads whatever the config says, each of one block."""
    config = json.loads((path / "config.json").read_text())
    vocab, size = base_lm_head.shape
    heads = nn.ModuleList(
        nn.Sequential(*([MedusaResBlock(size)] * config["medusa_num_layers"]), nn.Linear(size, vocab, bias=False))
        for _ in range(5)
    ).to(base_lm_head.dtype)
    loaded = heads.load_state_dict(torch.load(path / "medusa_lm_head.pt", map_location="cpu"), strict=False)
    num = config["medusa_num_heads"]
    assert not loaded.unexpected_keys and {int(key.split(".")[0]) for key in loaded.missing_keys} == set(range(num, 5))
    return torch.stack([head(hidden) for head in heads[:num]])


def tgi(path: Path, hidden: Tensor, base_lm_head: Tensor) -> Tensor:
    """`SpeculativeHead.load`: no `architectures`; `MedusaHeadV1`, and `MedusaHeadV2` when it raises."""
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["base_model_name_or_path"] and "architectures" not in config
    with safe_open(path / "medusa_lm_head.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    num, layers = config["medusa_num_heads"], config["medusa_num_layers"]

    def first(h: int) -> Tensor:
        x = hidden
        for layer in range(layers):
            x = x + silu(linear(x, weights[f"{h}.{layer}.linear.weight"], weights[f"{h}.{layer}.linear.bias"]))
        return linear(x, weights[f"{h}.{layers}.weight"])

    try:
        return torch.stack([first(h) for h in range(num)])
    except KeyError:
        assert layers == 1
        pairs = [(weights[f"{h}.0.linear.weight"], weights[f"{h}.0.linear.bias"]) for h in range(num)]
        return torch.stack([linear(hidden + silu(linear(hidden, *pair)), base_lm_head) for pair in pairs])


def tensorrt_llm(path: Path, hidden: Tensor, _: Tensor) -> Tensor:
    """`MedusaConfig.from_hugging_face` and `load_medusa_hf`; the bias is not optional."""
    config = json.loads((path / "config.json").read_text())
    file = path / "medusa_lm_head.pt"
    weights = torch.load(file) if file.exists() else load_file(path / "medusa_lm_head.safetensors")
    logits = []
    for h in range(config["num_medusa_heads"]):
        x = hidden
        for layer in range(config["medusa_num_layers"]):
            x = x + silu(linear(x, weights[f"{h}.{layer}.linear.weight"], weights[f"{h}.{layer}.linear.bias"]))
        logits.append(linear(x, weights[f"{h}.{config['medusa_num_layers']}.weight"]))
    return torch.stack(logits)


def vllm_config(path: Path) -> dict[str, Any]:
    """`MedusaConfig.from_pretrained`: whatever has "num" and "heads", or "num" and "layers", in its name."""
    config = json.loads((path / "config.json").read_text())
    for key in list(config):
        if "num" in key and "heads" in key:
            config["num_heads"] = config.pop(key)
        elif "num" in key and "layers" in key:
            config["num_hidden_layers"] = config.pop(key)
    return {"num_heads": 5, "num_hidden_layers": 1, "hidden_size": 4096, "vocab_size": 32001, **config}


def vllm(path: Path, hidden: Tensor, _: Tensor, remaps: bool = True) -> Tensor:
    """`DefaultModelLoader` (an index names the files) and `Medusa.load_weights`; `remaps`: other keys too."""
    config = vllm_config(path)
    shared, bias = config.get("original_lm_head", False), config.get("medusa_fc_bias", False)
    size, vocab, num, layers = (config[k] for k in ("hidden_size", "vocab_size", "num_heads", "num_hidden_layers"))
    kinds = ["weight", "bias"] if bias else ["weight"]
    truncated, token_map = config.get("truncated_vocab_size") or vocab, None
    params: dict[str, tuple[int, ...]] = {"lm_head.weight": (truncated, size)} if shared else {}
    for h in range(num):
        for layer in range(layers):
            params |= {
                f"blocks.{h}.layers.{layer}.{kind}": (size, size)[: 2 if kind == "weight" else 1] for kind in kinds
            }
        if not shared:
            params[f"lm_heads.{h}.weight"] = (vocab, size)
    files, index = sorted(path.glob("*.safetensors")), path / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    found: dict[str, Tensor] = {}
    for name, tensor in ((n, t) for file in files for n, t in load_file(file).items()):
        name, parts = name.replace("medusa_heads.", ""), name.split(".")
        if remaps and len(parts) >= 3 and parts[0].isdigit() and parts[1].isdigit():
            linear_at = parts.index("linear") if "linear" in parts else None
            rest = ".".join(parts[2:] if linear_at is None else parts[linear_at + 1 :])
            name = f"lm_heads.{parts[0]}.{rest}" if linear_at is None else f"blocks.{parts[0]}.layers.{parts[1]}.{rest}"
        if name == "token_map":
            token_map = tensor if truncated < vocab else None
        elif name in params:
            found[name] = tensor
        elif shared and name == "lm_heads.0.weight":
            found["lm_head.weight"] = tensor
    for name, tensor in found.items():
        if "lm_head" in name and token_map is not None and len(tensor) > len(token_map):
            found[name] = tensor[token_map]
    assert truncated == vocab or token_map is not None
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == params
    logits = []
    for h in range(num):
        x = hidden
        for layer in range(layers):
            x = x + silu(linear(x, *(found[f"blocks.{h}.layers.{layer}.{kind}"] for kind in kinds)))
        logits.append(linear(x, found["lm_head.weight" if shared else f"lm_heads.{h}.weight"]))
    if token_map is None:
        return torch.stack(logits)
    whole = torch.full((num, len(hidden), vocab), -torch.inf)
    whole[..., token_map] = torch.stack(logits)
    return whole
