"""Names of heads in other programs' files, both ways.

    ours                        FasterDecoding, TensorRT-LLM, TGI     vLLM
    {h}.blocks.{l}.weight|bias  {h}.{l}.linear.weight|bias            blocks.{h}.layers.{l}.weight|bias
    {h}.projection.weight       {h}.{L}.weight                        lm_heads.{h}.weight
    {h}.step.weight|bias                                              steps.{h}.weight|bias, which the plug-in reads

Projections onto N tokens (`token_map`) get rows for all V: of these programs vLLM alone knows such a map, and its code
loads one only beside a shared projection. An unmapped row is the mean of the mapped ones: its logit is the mean of
theirs and so never the greatest, where a row of zeros would win whenever all others are negative.

Heads that share the LM head: every projection is a copy of it for FasterDecoding and TensorRT-LLM, there is none at
all in TGI's second layout, and for vLLM (`original_lm_head`) a single one.
"""

import re
from typing import Any

import torch
from torch import Tensor

from medusa_ds.errors import UserError, counted
from medusa_ds.heads.files import META, check_token_map
from medusa_ds.heads.kinds import make_heads

_BLOCK = re.compile(r"(?:blocks\.(?=\d+\.layers))?(\d+)\.(?:layers\.(\d+)|(\d+)\.linear)\.(weight|bias)")
_PROJECTION = re.compile(r"(?:lm_heads\.(\d+)|(\d+)\.\d+)\.weight")


def to_medusa(heads: dict[str, Tensor], layers: int, projections: list[Tensor]) -> dict[str, Tensor]:
    """FasterDecoding's layout of a `MedusaHeads` state dict; each tensor owns its storage."""
    names = {name: re.sub(r"\.blocks\.(\d+)", r".\1.linear", name) for name in heads if ".blocks." in name}
    blocks = {theirs: heads[ours].clone() for ours, theirs in names.items()}
    return blocks | {f"{h}.{layers}.weight": weight.clone() for h, weight in enumerate(projections)}


def expand_rows(weight_NH: Tensor, token_map: Tensor, vocab_size: int) -> Tensor:
    """A projection [V, H] that guesses as one onto N tokens does."""
    weight_VH = weight_NH.mean(0, dtype=torch.float32).to(weight_NH.dtype).repeat(vocab_size, 1)
    weight_VH[token_map] = weight_NH
    return weight_VH


def to_vllm(heads: dict[str, Tensor], projections: list[Tensor]) -> dict[str, Tensor]:
    """Layout of vLLM for a state dict of heads; each tensor owns its storage."""
    names = {name: f"blocks.{name.replace('.blocks.', '.layers.')}" for name in heads if ".blocks." in name}
    names |= {name: f"steps.{name.replace('.step.', '.')}" for name in heads if ".step." in name}
    blocks = {theirs: heads[ours].clone() for ours, theirs in names.items()}
    return blocks | {f"lm_heads.{h}.weight": weight.clone() for h, weight in enumerate(projections)}


def from_other(
    tensors: dict[str, Tensor], shared: bool, vocab_size: int | None, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Heads of either layout.

    Args:
        tensors: what the files hold; missing biases, as vLLM allows them, are zero.
        shared: `original_lm_head`, one projection is the LM head's. Without any it is shared too.
        vocab_size: of the config, used where there is no projection or one with fewer rows.
        where: origin for messages.

    Returns:
        State dict of the matching `MedusaHeads`, and its `num`, `layers`, `lm_head`, `hidden_size`, `vocab_size`,
        counted from the tensors (published configs are wrong about them).

    Raises:
        UserError: tensors that are not heads, or heads of different shapes.
    """
    blocks: dict[tuple[int, int, str], Tensor] = {}
    projections: dict[int, Tensor] = {}
    unknown, token_map = [], None
    for name, tensor in tensors.items():
        short = re.sub(r"^medusa_heads?\.", "", str(name))
        is_weight = torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.dim() > 0
        if not is_weight and not (short == "token_map" and torch.is_tensor(tensor)):
            kind = f"{list(tensor.shape)} of {tensor.dtype}" if torch.is_tensor(tensor) else type(tensor).__name__
            raise UserError(f"{where}: {name}: found {kind}; heads are vectors and matrices of floating-point numbers")
        if match := _BLOCK.fullmatch(short):
            blocks[int(match[1]), int(match[2] or match[3] or 0), match[4]] = tensor
        elif match := _PROJECTION.fullmatch(short):
            projections[int(match[1] or match[2])] = tensor
        elif short == "token_map":
            token_map = tensor
        elif short != "lm_head.weight":
            unknown.append(name)
    own = bool(projections) and not shared
    num = 1 + max([*(h for h, *_ in blocks), *projections], default=-1)
    layers = 1 + max((layer for _, layer, _ in blocks), default=-1)
    if unknown or num == 0 or (not own and layers == 0):
        raise UserError(f"{where}: found {(unknown or list(tensors) or ['nothing'])[0]}; not heads of a known layout")
    if not (META["num"](num) and META["layers"](layers)):
        raise UserError(
            f"{where}: found {counted(num, 'head')} of {counted(layers, 'block')}; allowed are at most 64 of each"
        )
    hidden_size = next(iter([*blocks.values(), *projections.values()])).shape[-1]
    if projections and (token_map is None or own):
        vocab_size = projections[min(projections)].shape[0]
    if vocab_size is None:
        raise UserError(f"{where}: no projection tells the size of the vocabulary; write vocab_size into config.json")
    shape: dict[str, Any] = {"num": num, "layers": layers, "lm_head": "own" if own else "shared"}
    shape |= {"hidden_size": hidden_size, "vocab_size": vocab_size}
    with torch.device("meta"):
        like = make_heads({"kind": "medusa"} | shape)
    wanted = {name: tuple(parameter.shape) for name, parameter in like.named_parameters()}
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    heads = {f"{h}.projection.weight": weight for h, weight in projections.items() if own}
    heads |= {f"{h}.blocks.{layer}.{part}": tensor for (h, layer, part), tensor in blocks.items()}
    heads |= {name: torch.zeros(hidden_size) for name in wanted.keys() - heads.keys() if name.endswith(".bias")}
    found = {name: tuple(tensor.shape) for name, tensor in heads.items()}
    wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
    if wrong:
        text = f"{wrong[0]} is {found.get(wrong[0])}, not {wanted[wrong[0]]}"
        raise UserError(f"{where}: {text}; the files do not form heads of one shape")
    state = {name: tensor.to(dtype) for name, tensor in heads.items()}
    if token_map is not None and own:
        check_token_map(token_map, vocab_size, where)
        state = {name: tensor[token_map] if "projection" in name else tensor for name, tensor in state.items()}
        state["token_map"] = token_map
    return state, shape
