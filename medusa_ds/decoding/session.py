"""The static buffers of decoding: keys and values, masks, and the attention that reads them.

Each row of the cache holds the tree first (slots 0..N-1, overwritten at every step) and then the text, from slot N on.
All layers share one tensor, so that keeping the accepted path is one gather and one scatter. Prompts are padded on the
right, where causal attention never looks, and what lies beyond a row's length is hidden by the mask.

Attention is a function of our own in transformers' registry, for two reasons: transformers repeats keys and values for
grouped queries on every call with a mask, which copies the whole cache; here the query heads of a group become rows
instead. And layers with a sliding window need another mask than the others. Batches on a GPU attend through PyTorch's
FlexAttention, which reads a row's slots only as far as they are used; one row's tree by our own kernels where they
apply (`tree_attention`).

Shape suffixes: B rows, N tree nodes, D tree depth + 1, L slots.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_ds.decoding.kernels.tree_attention import applies, tree_attention
from medusa_ds.decoding.trees import Tree

_ATTENTION = "medusa_tree"
_BLOCK = 128  # slots that FlexAttention reads or skips together
_flex_attention = torch.compile(flex_attention, dynamic=False)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    window_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    batch, heads, rows, size = query.shape
    if attention_mask is not None:  # tree step
        mask = attention_mask if sliding_window is None else window_mask
        assert mask is not None
        grouped = query.reshape(batch, key.shape[1], -1, size)
        if isinstance(mask, BlockMask):
            out = _flex_attention(grouped, key, value, block_mask=mask, scale=scaling)
        elif applies(query):
            return tree_attention(query, key, value, mask, size**-0.5 if scaling is None else scaling), None
        elif query.is_cuda and batch == 1:  # fused kernels put one block on each key/value head: most of the GPU idles
            score = torch.bmm(grouped[0], key[0].mT, out_dtype=torch.float32)
            share = (score * (size**-0.5 if scaling is None else scaling) + mask[0]).softmax(-1)
            out = torch.bmm(share.to(value.dtype), value[0])
        else:
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(batch, heads, rows, value.shape[-1])
    else:  # prefill
        mask = None
        if sliding_window is not None and sliding_window < rows:
            mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def static_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend through a `Session`; before and after, it can serve transformers' own `generate`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Slots(CacheLayerMixin):
    """One layer's view of a session's keys and values, [B, key/value heads, L, head size]."""

    def __init__(self, keys: Tensor, values: Tensor, nodes: int) -> None:
        super().__init__()
        self.keys, self.values, self.nodes = keys, values, nodes
        self.prefilling, self.is_initialized = False, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        start = self.nodes if self.prefilling else 0
        self.keys[:, :, start : start + key_states.shape[2]] = key_states
        self.values[:, :, start : start + value_states.shape[2]] = value_states
        return (key_states, value_states) if self.prefilling else (self.keys, self.values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("allocated by the session")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name in older versions of transformers


class _StaticCache(Cache):
    """All layers' slots; `current`, where set, are those of the layer that runs, whatever number it has."""

    current: _Slots | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        slots: Any = self.layers[layer_idx] if self.current is None else self.current
        keys_values: tuple[Tensor, Tensor] = slots.update(key_states, value_states)
        return keys_values


class Session:
    """The buffers of a batch size and a number of slots, and the CUDA graph over them.

    Attributes:
        kv: [2 x layers, B, key/value heads, L, head size], keys and values by turns.
        cache: the same as a cache of transformers.
        cache_arguments: what a call of the backbone needs to use it.
        length_B: tokens of the text whose keys and values are there; the root of the tree is not.
        active_B: 1 while the row goes on; a row that ended keeps its length.
        tokens_BN: the tree's tokens, first the root.
        uniform_BN: draws for exact sampling.
        out_BD: what the host reads after a step: count of emitted tokens, then the tokens.
    """

    def __init__(self, backbone: PreTrainedModel, tree: Tree, batch: int, slots: int) -> None:
        config, device = backbone.config, backbone.device
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        self.group = config.num_attention_heads // heads
        self.window: int | None = getattr(config, "sliding_window", None)
        self.batch, self.slots, self.tree = batch, slots, tree
        self.kv = torch.zeros(2 * layers, batch, heads, slots, size, dtype=backbone.dtype, device=device)
        self._layers = [_Slots(self.kv[2 * i], self.kv[2 * i + 1], tree.nodes) for i in range(layers)]
        self.cache = _StaticCache(layers=list(self._layers))
        renamed = "cache" in inspect.signature(backbone.base_model.forward).parameters  # in transformers 5.24
        self.cache_arguments: dict[str, Any] = {
            "cache" if renamed else "past_key_values": self.cache,
            "use_cache": True,
        }
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.active_B = torch.ones(batch, dtype=torch.long, device=device)
        self.tokens_BN = torch.zeros(batch, tree.nodes, dtype=torch.long, device=device)
        self.uniform_BN = torch.zeros(batch, tree.nodes, device=device)
        self.out_BD = torch.zeros(batch, 2 + tree.depth, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        blocks = torch.arange(-(-slots // _BLOCK), dtype=torch.int32, device=device)
        self._block_indices = blocks.repeat(batch, 1, -(-self.group * tree.nodes // _BLOCK), 1)

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """While entered, the cache takes tokens as the beginning of the text instead of as a tree."""
        for layer in self._layers:
            layer.prefilling = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.prefilling = False

    def masks(self, position_BN: Tensor) -> dict[str, Any]:
        """Masks for `_attend`, additive [B, 1, group x N, L] or by blocks: a node sees the text and its ancestors."""
        tree = self.tree
        if (
            self.kv.is_cuda and self.batch > 1 and self.window is None and self.kv.shape[-1] >= 16
        ):  # FlexAttention's least
            return {"attention_mask": self.block_mask()}
        text_L = torch.arange(self.slots - tree.nodes, device=position_BN.device)
        seen_BNL = (text_L < self.length_B[:, None])[:, None].expand(-1, tree.nodes, -1)
        masks = {"attention_mask": self._additive(tree.mask_NN, seen_BNL)}
        if self.window is not None:
            near_NN = tree.depth_N[:, None] - tree.depth_N < self.window
            near_BNL = position_BN[..., None] - text_L < self.window
            masks["window_mask"] = self._additive(tree.mask_NN & near_NN, seen_BNL & near_BNL)
        return masks

    def block_mask(self) -> BlockMask:
        """The mask that skips blocks of slots which no node sees."""
        used_B11 = -(-(self.tree.nodes + self.length_B) // _BLOCK)[:, None, None]
        used_B1R = used_B11.to(torch.int32).expand(self._block_indices.shape[:3]).contiguous()
        return BlockMask.from_kv_blocks(
            used_B1R,
            self._block_indices,
            BLOCK_SIZE=_BLOCK,
            mask_mod=self._sees,
            seq_lengths=(self.group * self.tree.nodes, self.slots),
            compute_q_blocks=False,
        )

    def _sees(self, batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        nodes = self.tree.nodes
        ancestor = self.tree.mask_NN[row % nodes, slot.clamp(max=nodes - 1)]
        return torch.where(slot < nodes, ancestor, slot - nodes < self.length_B[batch])

    def _additive(self, tree_NN: Tensor, text_BNL: Tensor) -> Tensor:
        seen_BNL = torch.cat([tree_NN.expand(self.batch, -1, -1), text_BNL], -1)
        mask = torch.zeros(seen_BNL.shape, dtype=self.kv.dtype, device=self.kv.device)
        return mask.masked_fill_(~seen_BNL, -torch.inf).repeat(1, self.group, 1)[:, None]

    def keep(self, path_BD: Tensor, count_B: Tensor) -> None:
        """Copy a path's keys and values to the end of the text, which becomes `count_B` tokens longer in active rows.

        The whole path is copied, as shapes are static; what lies beyond the count is overwritten by the next steps.
        """
        step_D = torch.arange(path_BD.shape[1], device=path_BD.device)
        target_BD = self.tree.nodes + self.length_B[:, None] + step_D
        shape = (*self.kv.shape[:3], path_BD.shape[1], self.kv.shape[-1])
        source, target = (index[None, :, None, :, None].expand(shape) for index in (path_BD, target_BD))
        self.kv.scatter_(3, target, self.kv.gather(3, source))
        self.length_B.add_(count_B * self.active_B)
