"""Last hidden states of the frozen backbone on disk: computed once, read in every epoch, by this run and by others.

    DIR/manifest.json              what they were computed from
        shard-00000.safetensors    `states` [rows, H]; with fp8 also `scales` [rows], fp32
        shard-00000.json           its size and checksum, written last: a shard without it counts as missing

Kept by conversation, since every epoch packs conversations anew and a hidden state does not depend on what else is in
its sequence. A conversation has a row for every position that some head learns from, in order, so that a micro-batch
is the rows of its conversations one after another. Which conversations a shard holds follows from the data alone:
any number of ranks fills the cache, and any other number reads it, memory-mapped. Every start reads it through once for
the checksums, each rank its share.
"""

from __future__ import annotations

import functools
import json
import mmap
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from ctypes import CDLL, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medusa_ds import files
from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import CachedRows, Data, Sequences, best_fit
from medusa_ds.errors import UserError
from medusa_ds.heads.kinds import KINDS
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.backbone import cache_directory, facts_of, load_config, model_path
from medusa_ds.model.fp8 import row_scales
from medusa_ds.model.lm_head import Ends, read_ends
from medusa_ds.model.rows import any_head_rows
from medusa_ds.progress import progress
from medusa_ds.ranks import Ranks
from medusa_ds.training.build import free_models, load_frozen
from medusa_ds.training.checkpoint import check_file, write_tensors

SHARD_BYTES, MIN_SHARDS = 1 << 29, 16  # the latter so that ranks share a small cache evenly
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_FORMAT = 1
_SAMPLES, _SAMPLE_BYTES = 1024, 1 << 16  # of a file
_BATCH = 1000  # conversations whose rows are counted at once
_LIBC = CDLL(None)


def stored_as(recipe: Recipe, on_gpu: bool) -> tuple[str, str]:
    """Precision in which the backbone computes, and in which its hidden states are stored."""
    computed = "bf16" if recipe.ds_values(on_gpu=on_gpu)["bf16.enabled"] else "fp32"
    return computed, computed if recipe.data.hidden_cache_dtype == "auto" else recipe.data.hidden_cache_dtype


def row_bytes(stored: str, hidden_size: int) -> int:
    """Bytes of a row."""
    return hidden_size * STORED[stored].itemsize + (4 if stored == "fp8" else 0)


def count_rows(sequences: Sequences, num: int) -> np.ndarray:
    """Positions of each conversation from which heads 1..num learn, int64."""
    counts = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(sequences.rows), _BATCH):
        numbers = np.arange(start, min(start + _BATCH, len(sequences.rows)))
        lengths = sequences.lengths[numbers]
        batch = sequences.collate([numbers], int(lengths.sum()))
        mask = any_head_rows(batch.labels, batch.position_ids, num)[0].numpy()
        counts.append(np.add.reduceat(mask.astype(np.int64), np.cumsum(lengths) - lengths))
    return np.concatenate(counts)


def key_of(recipe: Recipe, data: Data, computed: str, stored: str) -> dict[str, Any]:
    """What the hidden states follow from."""
    model = recipe.model
    weights = []
    path = Path(model_path(model) if model.init == "pretrained" else model.name)
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.suffix not in (".safetensors", ".bin", ".py") and file.name != "config.json":
            continue
        size, samples = file.stat().st_size, []
        with open(file, "rb") as stream:  # samples of every layer: enough to tell a retrained model from its forerunner
            for start in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                stream.seek(start)
                samples.append(stream.read(_SAMPLE_BYTES))
        weights.append(f"{file.name} {size} {files.digest(*samples)}")
    return {
        "format": _FORMAT,
        "model": model.name,
        "init": model.init,
        "config": model.config,
        "revision": getattr(load_config(model), "_commit_hash", None) or model.revision,
        "weights": files.digest(*weights)[:32],
        "precision": computed,
        "stored": stored,
        "frozen precision": model.frozen_precision,
        "heads": recipe.heads.num,
        "template": data.report["template"],
        "training data": data.fingerprint,
        "held-out data": data.report["held_out_fingerprint"],
    }


class HiddenCache:
    """A directory, which need not exist, with hidden states of all conversations, first the training ones.

    `num` heads learn from rows of `hidden_size` numbers, `stored` as one of `STORED`.
    """

    def __init__(self, directory: Path, data: Data, num: int, hidden_size: int, stored: str) -> None:
        self.directory, self.num, self.hidden_size, self.stored = directory, num, hidden_size, stored
        self.splits = (data.train, data.validation)
        counts = np.concatenate([count_rows(split, num) for split in self.splits])
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # first row of each conversation, and the end
        self.bytes = int(self.starts[-1]) * row_bytes(stored, hidden_size)
        shards = min(max(MIN_SHARDS, -(-self.bytes // SHARD_BYTES)), max(len(counts), 1))
        cuts = np.searchsorted(self.starts, np.linspace(0, self.starts[-1], shards + 1)[1:-1])
        self.borders = np.unique(np.concatenate([[0], cuts, [len(counts)]]))  # first conversation of each shard
        self._open = functools.cache(lambda shard: load_file(self._file(shard)))  # memory-mapped

    def __len__(self) -> int:
        """Shards."""
        return len(self.borders) - 1

    def problem(self, shard: int) -> str | None:
        """What is wrong with a shard, read through; "" where it is merely not there yet."""
        file = self._file(shard)
        try:
            check_file(file, json.loads(file.with_suffix(".json").read_bytes()))
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            return f"{file}: {error}"
        return None

    def write(self, shard: int, states_MH: Tensor, scales_M: Tensor | None) -> None:
        """Write a shard whole or not at all."""
        file = self._file(shard)
        tensors = {"states": states_MH} | ({} if scales_M is None else {"scales": scales_M})
        with files.replacing(file) as work:
            entry = write_tensors(work, tensors)
        files.write(file.with_suffix(".json"), json.dumps(entry))

    def fill(self, shard: int, backbone: Any, micro_batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Compute a shard: one pass over its conversations, packed as the recipe packs them."""
        low, high = int(self.borders[shard]), int(self.borders[shard + 1])
        device, first = next(backbone.parameters()).device, self.starts[low]
        states_MH = torch.empty(int(self.starts[high] - first), self.hidden_size, dtype=STORED[self.stored])
        scales_M = torch.empty(len(states_MH)) if self.stored == "fp8" else None
        base = 0
        for split in self.splits:
            numbers = np.arange(max(low - base, 0), min(high - base, len(split.rows)))
            bins = best_fit(numbers, split.lengths, split.max_length) if split.packing else list(numbers[:, None])
            for start in range(0, len(bins), micro_batch_size):
                group = bins[start : start + micro_batch_size]
                batch = split.collate(group)
                with torch.no_grad():
                    hidden_RH = hidden_states(backbone, batch.input_ids.to(device), batch.position_ids)
                mask_R = any_head_rows(batch.labels, batch.position_ids, self.num).flatten()
                hidden_NH = hidden_RH[mask_R.to(device)]
                conversations = np.concatenate(group) + base
                counts = np.diff(self.starts)[conversations]
                rows = np.repeat(self.starts[conversations] - first - np.cumsum(counts) + counts, counts)
                rows_N = torch.from_numpy(rows + np.arange(counts.sum()))
                if scales_M is not None:
                    scale_N1 = row_scales(hidden_NH)
                    hidden_NH, scales_M[rows_N] = hidden_NH.float() / scale_N1, scale_N1[:, 0].cpu()
                states_MH[rows_N] = hidden_NH.to(states_MH.dtype).cpu()
            base += len(split.rows)
        return states_MH, scales_M

    def _file(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.safetensors"

    def read(self, split: int, numbers: np.ndarray, labels_BS: Tensor, position_ids_BS: Tensor) -> CachedRows:
        """Rows of conversations `numbers` of a split (0: training, 1: held out), which fill a micro-batch in order."""
        conversations, pin = numbers + split * len(self.splits[0].rows), torch.cuda.is_available()
        shards = np.searchsorted(self.borders, conversations, side="right") - 1
        begins, ends = self.starts[conversations], self.starts[conversations + 1]
        total, dtype = int((ends - begins).sum()), STORED[self.stored]
        states_MH = torch.empty(total, self.hidden_size, dtype=dtype, pin_memory=pin)
        scales_M = torch.empty(total, pin_memory=pin) if self.stored == "fp8" else None
        parts, at = [], 0
        for shard, begin, end in zip(shards.tolist(), begins.tolist(), ends.tolist(), strict=True):
            first = int(self.starts[self.borders[shard]])
            parts.append({name: tensor[begin - first : end - first] for name, tensor in self._open(shard).items()})
            _expect(parts[-1]["states"])
        for part in parts:
            rows = slice(at, at := at + len(part["states"]))
            states_MH[rows] = part["states"]
            if scales_M is not None:
                scales_M[rows] = part["scales"]
        mask_R = any_head_rows(labels_BS, position_ids_BS, self.num).flatten()
        assert int(mask_R.sum()) == total, "the cache and the micro-batch disagree about rows"
        return CachedRows(states_MH, mask_R.cumsum(0) - 1, scales_M)


def _expect(mapped: Tensor) -> None:
    """Tell the kernel that a memory-mapped tensor will be read: the disk reads all of a batch at once."""
    before = mapped.data_ptr() % mmap.PAGESIZE
    _LIBC.madvise(c_void_p(mapped.data_ptr() - before), c_size_t(before + mapped.nbytes), mmap.MADV_WILLNEED)


def open_hidden_cache(recipe: Recipe, data: Data, device: torch.device) -> Ends:
    """Let both splits give the hidden states of the recipe's cache, after filling what the cache lacks.

    Every rank calls it, in a process group. The backbone is on this rank's device while there is something to fill.

    Returns:
        All that training still needs of the backbone, on the CPU.

    Raises:
        UserError: the cache is of something else, another run fills it, or the disk has no room for it.
    """
    if facts_of(recipe.model).logits.bias:
        raise UserError("data.hidden_cache: the model's LM head has a bias, which the cache does not hold; use off")
    ranks = Ranks()
    computed, stored = stored_as(recipe, device.type == "cuda")
    key = key_of(recipe, data, computed, stored)
    directory = Path(recipe.data.hidden_cache)
    if recipe.data.hidden_cache == "auto":
        directory = cache_directory() / "hidden" / files.digest(json.dumps(key))[:32]
    config = load_config(recipe.model).get_text_config()
    cache = HiddenCache(directory, data, recipe.heads.num, config.hidden_size, stored)
    ranks.first(lambda: _claim(directory, key))
    found = {shard: cache.problem(shard) for shard in ranks.share(range(len(cache)))}
    missing = {shard: text for part in ranks.gather(found) for shard, text in part.items() if text is not None}
    with ExitStack() as stack:
        if missing:
            ranks.first(lambda: _begin(cache, missing, stack))
            _fill(cache, ranks.share(sorted(missing)), recipe, device)
            ranks.gather(None)  # all are done
        elif ranks.rank == 0:
            print(f"hidden cache: {directory}, {cache.bytes / 2**30:.2f} GiB, complete", flush=True)
    ranks.together(lambda: _see_all(cache, ranks.rank))
    data.train.hidden, data.validation.hidden = (functools.partial(cache.read, split) for split in (0, 1))
    ends = read_ends(recipe.model, STORED[computed], device, KINDS[recipe.heads.kind].sees_tokens)
    free_models(device)
    return ends


def _claim(directory: Path, key: dict[str, Any]) -> None:
    """Write the manifest of a new cache, or compare that of an old one."""
    file = directory / "manifest.json"
    try:
        with _explained(directory, 0):
            directory.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                if any(directory.iterdir()):
                    raise UserError(f"{directory}: holds other files and no manifest.json; name another directory")
                files.write(file, json.dumps(key, indent=2))
            found = json.loads(file.read_bytes())
        differ = [
            f"{name}: made with {found.get(name)!r}, the recipe has {value!r}"
            for name, value in key.items()
            if found.get(name) != value
        ]
    except (ValueError, AttributeError):
        raise UserError(f"{file}: damaged; remove the directory") from None
    if differ:
        raise UserError(f"data.hidden_cache: {directory}: {'; '.join(differ)}; name another directory, or auto")


def _begin(cache: HiddenCache, missing: dict[int, str], stack: ExitStack) -> None:
    """One run fills at a time, and only onto a disk with room; the lock is the stack's."""
    directory, size = cache.directory, cache.bytes * len(missing) // len(cache)
    try:
        with _explained(directory, size):
            stack.enter_context(files.lock(directory / "lock"))
            free = shutil.disk_usage(directory).free
            if free < size:
                raise OSError(f"{free} bytes are free")
    except files.InUseError:
        raise UserError(f"{directory}: another run is filling this hidden cache; wait for it") from None
    for text in filter(None, missing.values()):
        print(f"warning: {text}; computed again")
    print(
        f"hidden cache: filling {len(missing)} of {len(cache)} shards in {directory}, "
        f"{cache.bytes / 2**30:.2f} GiB in all",
        flush=True,
    )


def _fill(cache: HiddenCache, shards: Sequence[int], recipe: Recipe, device: torch.device) -> None:
    if not shards:
        return
    dtype = STORED[stored_as(recipe, device.type == "cuda")[0]]
    backbone = load_frozen(recipe, dtype, device).eval()
    for shard in progress(shards, "shards of the hidden cache") if Ranks().rank == 0 else shards:
        content = cache.fill(shard, backbone, recipe.train.micro_batch_size)
        with _explained(cache.directory, cache.bytes, one_rank=True):
            cache.write(shard, *content)
    del backbone
    free_models(device)


def _see_all(cache: HiddenCache, rank: int) -> None:
    if len(list(cache.directory.glob("shard-*.json"))) < len(cache):
        raise UserError(
            f"{cache.directory}: rank {rank} does not see what other ranks wrote; name a directory that all nodes share"
        )


def _explained(directory: Path, size: int, one_rank: bool = False) -> AbstractContextManager[None]:
    mend = f"it needs {size} bytes in a writable directory; what is finished stays, the same command goes on"
    return files.explained(f"{directory}: the hidden cache cannot be written", mend, one_rank=one_rank)
