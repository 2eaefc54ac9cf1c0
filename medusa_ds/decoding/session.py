"""The static buffers of decoding: keys and values, masks, and the attention that reads them.

Each row of the cache holds the tree first (slots 0..N-1, overwritten at every step) and then the text, from slot N on;
where a step verifies a part of the tree, the rest of these slots is left alone.
All keys and values of one shape share one tensor (of most models all), so that keeping the accepted path is one gather
and one scatter; which shapes a layer keeps is asked of the model. Prompts are padded on the right, where causal
attention never looks, and what lies beyond a row's length is hidden by the mask.

Attention is a function of our own in transformers' registry, for two reasons: transformers repeats keys and values for
grouped queries on every call with a mask, which copies the whole cache; here the query heads of a group become rows
instead. And layers with a sliding window need another mask than the others. Batches on a GPU attend through PyTorch's
FlexAttention, which reads a row's slots only as far as they are used; one row's tree by our own kernels where they
apply (`tree_attention`).

Shape suffixes: B rows, N tree nodes, D tree depth + 1, L slots.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicIndexedLayer

from medusa_ds.config.loading import positions_of
from medusa_ds.config.recipe import ModelSpec
from medusa_ds.decoding.kernels.packed import pack_projections
from medusa_ds.decoding.kernels.tree_attention import applies, tree_attention
from medusa_ds.decoding.trees import Tree
from medusa_ds.errors import UserError
from medusa_ds.model import facts
from medusa_ds.model.attention import base_model, hidden_states
from medusa_ds.model.backbone import facts_of, load_config
from medusa_ds.model.facts import Asked, build_twin, differ, find_facts, tokens_of_documents

T = TypeVar("T")
_ATTENTION = "medusa_tree"
_BLOCK = 128  # slots that FlexAttention reads or skips together
_flex_attention: Any = None  # compiled for the first session that needs it: importing PyTorch's compiler takes a second


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    window_masks: dict[int, Tensor] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    batch, heads, rows, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    if attention_mask is not None:  # tree step
        mask = window_masks[sliding_window] if sliding_window and window_masks else attention_mask
        grouped = query.reshape(batch, key.shape[1], -1, size)
        if isinstance(mask, BlockMask):
            out = _flex_attention(grouped, key, value, block_mask=mask, scale=scale)
        elif softcap or s_aux is not None:
            out = _capped(query, key, value, mask[:, :, :rows], scale=scale, softcap=softcap, s_aux=s_aux)
        elif applies(query) and key.shape == value.shape:
            return tree_attention(query, key, value, mask, scale), None
        elif query.is_cuda and batch == 1:  # fused kernels put one block on each key/value head: most of the GPU idles
            score = torch.bmm(grouped[0], key[0].mT, out_dtype=torch.float32)
            share = (score * scale + mask[0, :, : grouped.shape[2]]).softmax(-1)
            out = torch.bmm(share.to(value.dtype), value[0])
        else:
            mask = mask[:, :, : grouped.shape[2]]
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        out = out.reshape(batch, heads, rows, value.shape[-1])
    else:  # prefill
        seen = None
        if (sliding_window and sliding_window < rows) or softcap or s_aux is not None:
            seen = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()
            seen = seen.triu(1 - sliding_window) if sliding_window else seen
        if softcap or s_aux is not None:
            assert seen is not None
            mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
            out = _capped(query, key, value, mask, scale=scale, softcap=softcap, s_aux=s_aux)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
            )
    return out.transpose(1, 2).contiguous(), None


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention whose scores approach a cap, or that may turn to nothing (`s_aux`, a score for each head)."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    score = (query @ key.mT * scale).float()
    score = softcap * (score / softcap).tanh() if softcap else score
    score = score + mask
    if s_aux is not None:
        score = torch.cat([score, s_aux.float().view(1, -1, 1, 1).expand(*score.shape[:3], 1)], -1)
    return score.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def static_attention(model: PreTrainedModel, name: str | None = None) -> Iterator[None]:
    """Let the model attend through a `Session`; before and after, it can serve transformers' own `generate`."""
    before = model.config._attn_implementation
    if name is None:
        under_masks = before if before in ("eager", "sdpa") else "eager"
        name = under_masks if layout_of(model).masked else _ATTENTION
    if name != before:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != before:
            model.set_attn_implementation(before)


class Layout(NamedTuple):
    """What a model keeps of a token, found by letting it read one.

    `kept`: of each layer the shapes of its keys, its values and, where it has them, the keys by which it selects among
    them: heads, size, dtype if that is not the model's. Nothing of a layer that keeps nothing. `group`: most query
    heads that share a key. `masked`: layers attend by themselves or change the mask that they are given, so that they
    read prompts under one too. `near`: which positions a query sees where that is a part of the text, by sliding
    windows or, of masked layers, by the types that the config gives them.
    """

    kept: list[list[tuple[int, int, torch.dtype | None]]]
    group: int
    masked: bool
    near: dict[Any, Callable[[Tensor, Tensor], Tensor]]


def _once(ask: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """Ask each model once."""
    answers: Any = WeakKeyDictionary()

    @functools.wraps(ask)
    def answer(backbone: PreTrainedModel) -> T:
        if backbone not in answers:
            answers[backbone] = ask(backbone)
        found: T = answers[backbone]
        return found

    return answer


class _Call(NamedTuple):
    """What a layer gives to attention: query heads of a key, its window or 0, the mask."""

    group: int
    window: int
    mask: Any


@torch.no_grad()
def _read_a_token(backbone: PreTrainedModel, mask: Tensor | BlockMask) -> tuple[Any, list[_Call]]:
    """Let a model read a token under a mask: its cache, and its layers' calls of attention."""
    calls = []

    def note(
        _: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        calls.append(_Call(group, options.get("sliding_window") or 0, attention_mask))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("medusa_note", note)
    cache = Cache(layer_class_to_replicate=DynamicIndexedLayer)
    token = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    inputs = {"input_ids": token, "position_ids": token, "attention_mask": mask}
    with static_attention(backbone, "medusa_note"):
        base_model(backbone)(**inputs, **cache_arguments(backbone, cache))
    return cache, calls


@_once
def layout_of(backbone: PreTrainedModel) -> Layout:
    """Ask a model, once; what its layers keep beside keys and values raises an error."""
    cache, calls = _read_a_token(backbone, torch.zeros(1, 1, 1, 1, dtype=backbone.dtype, device=backbone.device))
    selects = any(layer.is_indexer_initialized for layer in cache.layers)
    text: Any = backbone.config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ())
    group = max((call.group for call in calls), default=1)
    near: dict[Any, Any] = {window: _within(window) for window in {call.window for call in calls} - {0}}
    changed = any(mask is not None and (mask.shape[1] > 1 or bool(mask.any())) for *_, mask in calls)
    if masked := not calls or changed or selects or "chunked_attention" in types:
        group, partly = 1, types & {"sliding_attention", "chunked_attention"}
        near = {kind: _near(text, kind) for kind in types} if partly else {}
    kept = []
    for layer in cache.layers:
        parts = [layer.keys, layer.values] if layer.is_initialized else []
        parts += [layer.indexer_keys[:, None]] if layer.is_indexer_initialized else []
        own = [None if part.dtype == backbone.dtype else part.dtype for part in parts]
        kept.append([(part.shape[1], part.shape[3], dtype) for part, dtype in zip(parts, own, strict=True)])
    return Layout(kept, group, masked, near)


@_once
def takes_blocks(backbone: PreTrainedModel) -> bool:
    """Whether a model hands a mask of blocks on to attention as it is."""
    block = create_block_mask(lambda _batch, _head, row, slot: row >= slot, None, None, 1, 1, device=backbone.device)
    with suppress(AttributeError, IndexError, TypeError, ValueError):  # it looks into the mask
        calls = _read_a_token(backbone, block)[1]
        return bool(calls) and all(isinstance(call.mask, BlockMask) for call in calls)
    return False


def _within(window: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: query - key < window


def _near(text: Any, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    if kind == "chunked_attention":
        return lambda query, key: query // text.attention_chunk_size == key // text.attention_chunk_size
    return _within(text.sliding_window if kind == "sliding_attention" else sys.maxsize)


def cache_arguments(backbone: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """What a call of the base model needs to use a cache."""
    renamed = "cache" in inspect.signature(base_model(backbone).forward).parameters  # in transformers 5.24
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}


class _Slots(CacheLayerMixin):
    """One layer's view of a session's keys, values, and keys that it selects by, [B, key/value heads, L, head size]."""

    def __init__(self, nodes: int, keys: Tensor, values: Tensor, indexer_keys: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.indexer_keys, self.nodes = keys, values, indexer_keys, nodes
        self.prefilling, self.is_initialized = False, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self._put(self.indexer_keys, indexer_key_states[:, None])[:, 0]

    def _put(self, kept: Tensor | None, states: Tensor) -> Tensor:
        """Write the states of tokens; what the layer reads of them."""
        assert kept is not None
        start = self.nodes if self.prefilling else 0
        kept[:, :, start : start + states.shape[2]] = states
        return states if self.prefilling else kept

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
        return self._slots(layer_idx).update(key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        return self._slots(layer_idx).update_indexer(indexer_key_states)

    def _slots(self, layer_idx: int) -> Any:
        return self.layers[layer_idx] if self.current is None else self.current


class Session:
    """The buffers of a batch size and a number of slots, and the CUDA graphs over them.

    Attributes:
        kv: for each shape [tensors, B, heads, L, size]; where all are of one shape, keys and values by turns.
        tree: of the next step, the one that the session was made for or a part of it.
        cache: the same as a cache of transformers.
        cache_arguments: what a call of the backbone needs to use it.
        length_B: tokens of the text whose keys and values are there; the root of the tree is not.
        active_B: 1 while the row goes on; a row that ended keeps its length.
        tokens_BN: the tree's tokens, first the root.
        uniform_BN: draws for exact sampling.
        path_BD: nodes of the last step's path, as in `Verdict`.
        out_BD: what the host reads after a step: count of emitted tokens, then the tokens.
        graph: the step's; None where it is not captured.
        prefills: by length, the prompts' padded tokens [B, length] and the graph that reads them.
        pool: memory of all of these graphs, of which one runs at a time.
    """

    def __init__(self, backbone: PreTrainedModel, tree: Tree, batch: int, slots: int) -> None:
        layout, device = layout_of(backbone), backbone.device
        _, self.group, self.masked, self.near = layout
        self.batch, self.slots, self.tree, self.reserved = batch, slots, tree, tree.nodes
        shapes = [shape for layer in layout.kept for shape in layer]
        parts: dict[Any, Iterator[Tensor]] = {}
        self.kv, self.dtype = [], backbone.dtype
        for shape in dict.fromkeys(shapes):
            heads, size, own = shape
            number, dtype = shapes.count(shape), own or self.dtype
            self.kv.append(torch.zeros(number, batch, heads, slots, size, dtype=dtype, device=device))
            parts[shape] = iter(self.kv[-1])
        alike = len(self.kv) == 1 and not self.near and self.kv[0].shape[-1] >= 16  # FlexAttention's least
        on_gpu = device.type == "cuda" and batch > 1
        self.blocks = alike and on_gpu and not self.masked and takes_blocks(backbone)
        if self.blocks:
            global _flex_attention
            _flex_attention = _flex_attention or torch.compile(flex_attention, dynamic=False)
        nothing = torch.zeros(batch, 0, slots, 0, dtype=self.dtype, device=device)
        self._layers = [
            _Slots(tree.nodes, *([next(parts[shape]) for shape in layer] or [nothing, nothing]))
            for layer in layout.kept
        ]
        self.cache = _StaticCache(layers=list(self._layers))
        self.cache_arguments = cache_arguments(backbone, self.cache)
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.active_B = torch.ones(batch, dtype=torch.long, device=device)
        self.tokens_BN = torch.zeros(batch, tree.nodes, dtype=torch.long, device=device)
        self.uniform_BN = torch.zeros(batch, tree.nodes, device=device)
        self.out_BD = torch.zeros(batch, 2 + tree.depth, dtype=torch.long, device=device)
        self.path_BD = torch.zeros(batch, 1 + tree.depth, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prefills: dict[int, tuple[Tensor, torch.cuda.CUDAGraph | None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
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

    def prompt_mask(self, tokens: int) -> dict[str, Any]:
        """The causal mask under which prompts, padded to so many tokens, are read where the layers need one."""
        if not self.masked:
            return {}
        position_S = torch.arange(tokens, device=self.length_B.device)
        seen_BSS = (position_S[:, None] >= position_S).expand(self.batch, -1, -1)
        position_BS = position_S.expand(self.batch, -1)
        return self._additive(seen_BSS, position_BS, position_BS)

    def masks(self, position_BN: Tensor) -> dict[str, Any]:
        """Masks for `_attend`, additive [B, 1, group x N, L] or by blocks: a node sees the text and its ancestors."""
        tree, beyond = self.tree, (0, self.reserved - self.tree.nodes)
        if self.blocks:
            return {"attention_mask": self.block_mask()}
        text_L = torch.arange(self.slots - self.reserved, device=position_BN.device)
        text_BNL = (text_L < self.length_B[:, None])[:, None].expand(-1, tree.nodes, -1)
        tree_BNN = F.pad(tree.mask_NN, beyond).expand(self.batch, -1, -1)
        seen_BNL, position_BL = torch.cat([tree_BNN, text_BNL], -1), text_L.expand(self.batch, -1)
        if self.near:  # else nobody reads positions
            position_BL = torch.cat([F.pad(position_BN, beyond), position_BL], -1)
        return self._additive(seen_BNL, position_BN, position_BL)

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

    def _additive(self, seen_BQK: Tensor, query_BQ: Tensor, key_BK: Tensor) -> dict[str, Any]:
        """Masks [B, 1, group x Q, K] of the keys seen, and of the part of them that layers of each kind see."""

        def additive(seen_BQK: Tensor) -> Tensor:
            mask = torch.zeros(seen_BQK.shape, dtype=self.dtype, device=seen_BQK.device)
            return mask.masked_fill_(~seen_BQK, -torch.inf).repeat(1, self.group, 1)[:, None]

        parts = {
            name: additive(seen_BQK & near(query_BQ[..., None], key_BK[:, None])) for name, near in self.near.items()
        }
        if self.masked:
            return {"attention_mask": parts or additive(seen_BQK)}
        return {"attention_mask": additive(seen_BQK)} | ({"window_masks": parts} if parts else {})

    def keep(self, path_BD: Tensor, count_B: Tensor) -> None:
        """Copy a path's keys and values to the end of the text, which becomes `count_B` tokens longer in active rows.

        The whole path is copied, as shapes are static; what lies beyond the count is overwritten by the next steps.
        """
        step_D = torch.arange(path_BD.shape[1], device=path_BD.device)
        target_BD = self.reserved + self.length_B[:, None] + step_D
        for kv in self.kv:
            shape = (*kv.shape[:3], path_BD.shape[1], kv.shape[-1])
            source, target = (index[None, :, None, :, None].expand(shape) for index in (path_BD, target_BD))
            kv.scatter_(3, target, kv.gather(3, source))
        self.length_B.add_(count_B * self.active_B)


def position_limit(config: PretrainedConfig) -> tuple[int, bool]:
    """Most tokens of a text, and whether no position beyond may be asked for, not even of a token that is dropped.

    Raises:
        UserError: the model cannot be decoded.
    """
    asked = Asked(config)
    if (reason := why_not_decoded(asked)) is not None:
        raise UserError(f"model.name: not decoded: {reason}; its heads can be trained and exported")
    limit = find_facts(asked).limit
    return limit or positions_of(config.get_text_config().to_dict()) or 1 << 30, limit is not None


def describe(spec: ModelSpec) -> list[str]:
    """Lines on what a recipe's model can do: logits, packing, attention, decoding.

    Raises:
        UserError: see `facts_of`.
    """
    reason = why_not_decoded(Asked(load_config(spec), spec.attention, spec.trust_remote_code))
    decoding = "with heads and without" if reason is None else f"none: {reason}; heads can be trained and exported"
    return [*facts.describe(facts_of(spec)), f"decoding: {decoding}"]


@functools.cache
def why_not_decoded(asked: Asked) -> str | None:
    """Why steps of a tree would not give a model's own text; None: they do, in two steps of a twin.

    Two rows of unequal texts, five nodes; every node's hidden state against that of its text read as a whole.
    """
    with suppress(Exception):  # whatever a model may raise that keeps or attends otherwise
        if _steps_agree(build_twin(asked), build_twin(asked)):
            return None
    return _obstacle(build_twin(asked))


@torch.no_grad()
def _obstacle(twin: PreTrainedModel) -> str:
    """What stands in the way of steps of a tree, asked of a twin whose steps are not right."""
    kind, (ids, positions), kept = twin.config.model_type, tokens_of_documents(9), []
    with suppress(AttributeError):  # a config without layers
        kept = DynamicCache(config=twin.config.get_text_config()).layers
    if twin._is_stateful or any(hasattr(layer, "conv_states") for layer in kept):
        return f"layers of {kind} carry a state that cannot go back to an earlier token"
    try:
        output = base_model(twin)(input_ids=ids, position_ids=positions, use_cache=True)
        if not any(isinstance(part, Cache) for part in output.values()):
            return f"{kind} keeps nothing of what it computed"
        with suppress(Exception):  # as above
            if not _cache_agrees(twin):
                return f"{kind} attends otherwise through transformers' cache than without it"
        hidden_SH = hidden_states(twin, ids, positions)
        if not differ(hidden_states(twin, ids, 2 * positions), hidden_SH):
            return f"{kind} counts positions itself, so that no two guesses can stand at the same one"
        nothing_hidden = torch.zeros(1, 1, 9, 9)
        output = base_model(twin)(input_ids=ids, position_ids=positions, attention_mask=nothing_hidden)
        if not differ(output.last_hidden_state[0], hidden_SH):
            return f"{kind} hides tokens by their order, whatever mask it is given"
    except Exception:  # as above
        return f"{kind} does not attend, or keep what it computed, by transformers' interfaces"
    return f"{kind} gives other hidden states in steps of a tree"


@torch.no_grad()
def _cache_agrees(twin: PreTrainedModel) -> bool:
    """Whether a token read through a cache of transformers gets the hidden state that it has in the whole text."""
    own, (ids, positions) = DynamicCache(config=twin.config.get_text_config()), tokens_of_documents(9)
    for part in (slice(0, 8), slice(8, 9)):
        inputs = {"input_ids": ids[:, part], "position_ids": positions[:, part], **cache_arguments(twin, own)}
        last_1H = base_model(twin)(**inputs).last_hidden_state[:, -1]
    return not differ(last_1H[0], hidden_states(twin, ids, positions)[-1])


@torch.no_grad()
def _steps_agree(twin: PreTrainedModel, reference: PreTrainedModel) -> bool:
    pack_projections(twin)  # which counts on the order in which layers call them
    tree, texts = Tree([(0,), (1,), (0, 0), (0, 1)]), [tokens_of_documents(length)[0][0] for length in (9, 4)]
    session, good = Session(twin, tree, 2, 32), True
    with static_attention(twin), session.prefilling():
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        inputs = {"input_ids": ids, "position_ids": torch.arange(9).expand(2, 9), **session.prompt_mask(9)}
        base_model(twin)(**inputs, **session.cache_arguments)
    session.length_B.copy_(torch.tensor([9, 4]))
    good &= _cache_agrees(reference)
    for step in range(2):
        tokens_BN = torch.arange(10).view(2, 5) + 20 + 10 * step
        position_BN = session.length_B[:, None] + tree.depth_N
        with static_attention(twin):
            inputs = {"input_ids": tokens_BN, "position_ids": position_BN, **session.masks(position_BN)}
            found_BNH = base_model(twin)(**inputs, **session.cache_arguments).last_hidden_state
        for row, text in enumerate(texts):
            for node in range(tree.nodes):
                whole = torch.cat([text, tokens_BN[row, tree.mask_NN[node]]])[None]
                wanted_H = hidden_states(reference, whole, torch.arange(whole.numel())[None])[-1]
                good &= not differ(found_BNH[row, node], wanted_H)
        path, count_B = torch.tensor([[0, 1, 3], [0, 2, 2]]), torch.tensor([3, 2])
        session.keep(path, count_B)
        texts = [torch.cat([text, tokens_BN[row, path[row, : count_B[row]]]]) for row, text in enumerate(texts)]
    return good
