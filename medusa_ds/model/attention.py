"""Attention of documents that share a sequence, by a fused kernel that knows where each begins, without a mask.

transformers keeps documents apart by a mask [B, 1, S, S], which costs as much as if every token saw all others, and
repeats keys and values for each query head. Sequences of a single document need neither: there it is PyTorch's causal
attention.

Shapes: B sequences, S tokens, D documents.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NAME = "documents"
"""Of this implementation among those of transformers."""
_DOCUMENTS, _TOKENS = 16, 128  # multiples of which are told, so that layers are seldom compiled for new numbers


def base_model(model: Any) -> Any:
    """What gives hidden states, where transformers' own property of this name finds it and where it does not."""
    base = model.base_model
    return base if base is not model else next((m for m in model.children() if isinstance(m, PreTrainedModel)), base)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for what that has to do before."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_cuda else tensor.contiguous().pin_memory()).to(device, non_blocking=True)


def hidden_states(backbone: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states [B*S, H]; documents of a sequence are kept apart by position ids, best given on the CPU."""
    options: dict[str, Any] = {}
    knows = backbone.config._attn_implementation == NAME
    if knows and (documents := find_documents(position_ids)) is not None:
        options = {"document_starts": moved(documents[0], input_ids.device), "longest_document": documents[1]}
    positions = moved(position_ids, input_ids.device)
    output = base_model(backbone)(input_ids=input_ids, position_ids=positions, use_cache=False, **options)
    return output.last_hidden_state.flatten(0, 1)


def find_documents(position_ids_BS: Tensor) -> tuple[Tensor, int] | None:
    """Where documents begin among B*S tokens, and how long they are; None: each sequence is one.

    Returns:
        Starts, int32, ascending, then B*S to the end of a multiple of 16; the longest one's tokens, rounded up to a
        multiple of 128.
    """
    starts_D, end = (position_ids_BS.flatten() == 0).nonzero().flatten(), position_ids_BS.numel()
    if len(starts_D) == len(position_ids_BS):
        return None
    size = _rounded(len(starts_D) + 1, _DOCUMENTS)
    starts_D = nn.functional.pad(starts_D.int(), (0, size - len(starts_D)), value=end)
    return starts_D, _rounded(int(starts_D.diff().max()), _TOKENS)


def fits(config: Any) -> bool:
    """Whether the fused kernel of this GPU computes the attention of a model: causal, over the whole document."""
    slides = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    new_enough = torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 0)
    return new_enough and not slides and size % 8 == 0 and size <= 256


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def within_documents(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    document_starts: Tensor | None = None,
    longest_document: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of queries [B, heads, S, size] in transformers' convention, in documents as found above."""
    size_B, _heads, size_S, _size = query.shape
    if document_starts is None:
        options: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
        return nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    ends = (document_starts, document_starts, longest_document, longest_document)
    attended = torch.ops.aten._flash_attention_forward(*flat, *ends, 0.0, True, False, scale=scaling)[0]
    return attended.unflatten(0, (size_B, size_S)), None
