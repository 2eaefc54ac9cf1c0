"""Medusa heads (arXiv 2401.10774, section 2.1), their loss, and the files that hold them alone.

    head(x) = projection(block_L(... block_1(x))),    block(x) = x + SiLU(W x + b)

W and b start at zero, so a new head gives exactly what its projection gives: with a copy of the LM head, the LM head's
own logits. Two decisions follow from ZeRO-3, which keeps a weight whole only while the module that owns it directly is
called. A layer's weights are set in `reset_parameters`, since under `deepspeed.zero.Init` they are partitioned as soon
as the layer's constructor returns. And a projection computes the loss in its own forward: heads call it, be it their
own or the backbone's LM head handed to them, and nobody reads another module's weight. A shared projection is an
argument and never a submodule, as ZeRO-3 would hang its hooks on it twice.

Shapes: N rows, H hidden size, V vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa_ds.config.parsing import read_json, redact
from medusa_ds.errors import UserError
from medusa_ds.model.loss import Impl
from medusa_ds.model.projection import VocabularyProjection, ZeroLinear

FORMAT_VERSION = 1
_TENSORS, _CONFIG = "heads.safetensors", "heads.json"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


_META: dict[str, Callable[[Any], bool]] = {
    "base_model": _text,
    "revision": lambda value: value is None or _text(value),
    "num": _between(1, 64),
    "layers": _between(0, 64),
    "lm_head": lambda value: value in ("own", "shared"),
    "hidden_size": _between(1, 1 << 20),
    "vocab_size": _between(1, 1 << 24),
    "recipe": _text,
}


class ResBlock(ZeroLinear):
    """`x + SiLU(Wx + b)`, the identity at the start."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None):
        super().__init__(hidden_size, hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block to [..., H]."""
        return hidden + nn.functional.silu(super().forward(hidden))


class MedusaHead(nn.Module):
    """One head: residual blocks and a projection, its own or one that is handed to it with every call.

    With a token map, row i of its own projection stands for token `token_map[i]`; its logits are of these N tokens.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        vocab_size: int,
        own_projection: bool,
        dtype: torch.dtype | None = None,
        token_map: Tensor | None = None,
    ):
        super().__init__()
        self.token_map: Tensor | None
        self.row_V: Tensor | None
        self.register_buffer("token_map", token_map, persistent=False)
        self.register_buffer("row_V", _rows_of_tokens(token_map, vocab_size), persistent=False)
        vocab_size = vocab_size if token_map is None else len(token_map)
        self.blocks = nn.Sequential(*(ResBlock(hidden_size, dtype) for _ in range(layers)))
        self.projection = VocabularyProjection(hidden_size, vocab_size, dtype) if own_projection else None

    def forward(
        self,
        hidden_NH: Tensor,
        targets_N: Tensor,
        impl: Impl = "torch",
        chunk_mib: int = 1024,
        shared_projection: nn.Module | None = None,
        teacher_NH: Tensor | None = None,
        temperature: float = 1.0,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of supervised rows.

        Args:
            hidden_NH: the backbone's last hidden states at the head's rows.
            targets_N: their token ids, all of which have a row.
            impl: see `loss.linear_cross_entropy`, as `chunk_mib`.
            chunk_mib: memory that one chunk of logits may take, MiB.
            shared_projection: the backbone's LM head; used by heads without a projection of their own.
            teacher_NH: hidden states from which the LM head predicts the targets; with them the loss is the head's
                divergence from that prediction, and the targets do not count.
            temperature: see `loss.linear_kl`.
            scale: see `loss.linear_cross_entropy`.

        Returns:
            `(loss_sum, predicted_N)`.
        """
        rows_NH = self.blocks(hidden_NH)
        if torch.is_grad_enabled() and not rows_NH.requires_grad:
            rows_NH = rows_NH.detach().requires_grad_()  # ZeRO-3 frees weights when a module's input gets its gradient
        if teacher_NH is not None:  # both weights are whole inside the LM head's call
            assert shared_projection is not None
            own = self.projection
            teacher = {"teacher_NH": teacher_NH, "temperature": temperature, "student": own, "scale": scale}
            return shared_projection(rows_NH, chunk_mib=chunk_mib, **teacher)
        projection = self._projection(shared_projection)
        loss_sum, predicted_N = projection(rows_NH, self.rows(targets_N), impl, chunk_mib, scale=scale)
        return loss_sum, self.tokens(predicted_N)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the projection for token ids, -1 for tokens without one."""
        return token_ids if self.row_V is None else self.row_V[token_ids]

    def tokens(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the projection."""
        return rows if self.token_map is None else self.token_map[rows]

    def logits(self, hidden: Tensor, shared_projection: nn.Module | None = None) -> Tensor:
        """Logits [..., V or N] of hidden states [..., H]."""
        return self._projection(shared_projection)(self.blocks(hidden))

    def _projection(self, shared: nn.Module | None) -> nn.Module:
        projection = self.projection if self.projection is not None else shared
        assert projection is not None, "a head without a projection needs the backbone's LM head"
        return projection


class MedusaHeads(nn.ModuleList):
    """All heads; head k of the paper is item k-1.

    Args:
        num: heads.
        layers: residual blocks of each.
        hidden_size: H.
        vocab_size: V, the rows of the LM head's weight.
        own_projection: whether each head has a projection; False uses the LM head handed to it.
        dtype: of all parameters.
        token_map: LongTensor [N], the tokens of own projections' rows; None: all V.
    """

    def __init__(
        self,
        num: int,
        layers: int,
        hidden_size: int,
        vocab_size: int,
        own_projection: bool = True,
        dtype: torch.dtype | None = None,
        token_map: Tensor | None = None,
    ):
        shape = (layers, hidden_size, vocab_size, own_projection, dtype, token_map)
        super().__init__(MedusaHead(*shape) for _ in range(num))
        self.vocab_size = vocab_size
        self.token_map: Tensor | None
        self.register_buffer("token_map", token_map)

    @property
    def known_V(self) -> Tensor | None:
        """Which tokens have a row, on the CPU; None: all."""
        return None if self.token_map is None else self.knows(torch.arange(self.vocab_size)).cpu()

    def knows(self, token_ids: Tensor) -> Tensor:
        """Whether each token has a row."""
        head = self[0]
        assert isinstance(head, MedusaHead)
        return head.rows(token_ids) >= 0

    @torch.no_grad()
    def initialize(self, lm_head_weight: Tensor) -> None:
        """Copy the LM head's weight [V, H], or its mapped rows, into own projections (ZeRO-3: all of them gathered)."""
        rows = ... if self.token_map is None else self.token_map.to(lm_head_weight.device)
        for module in self.modules():
            if isinstance(module, VocabularyProjection):
                module.weight.copy_(lm_head_weight[rows])


def _rows_of_tokens(token_map: Tensor | None, vocab_size: int) -> Tensor | None:
    """Row of each of V tokens, -1 for those without one."""
    if token_map is None:
        return None
    row_V = torch.full((vocab_size,), -1, dtype=torch.long, device=token_map.device)
    row_V[token_map] = torch.arange(len(token_map), device=token_map.device)
    return row_V


def check_token_map(token_map: Tensor, vocab_size: int, where: str | Path) -> None:
    """Refuse what is not a list of different tokens of the vocabulary.

    Raises:
        UserError: naming the file.
    """
    problem = None
    if token_map.dtype != torch.int64 or token_map.dim() != 1:
        problem = f"is {list(token_map.shape)} of {token_map.dtype}, not a list of int64"
    elif not 0 < len(token_map) <= vocab_size:
        problem = f"has {len(token_map)} tokens; allowed are 1 to vocab_size {vocab_size}"
    elif len(outside := token_map[(token_map < 0) | (token_map >= vocab_size)]):
        problem = f"names token {int(outside[0])}, outside vocab_size {vocab_size}"
    elif len(token_map.unique()) != len(token_map):
        problem = "names a token twice"
    if problem:
        raise UserError(f"{where}: token_map {problem}; save the heads again")


def different_maps(found: list[int] | None, wanted: list[int] | None) -> str | None:
    """In what two token maps differ, in words; None where they do not."""
    if found == wanted:
        return None
    if found is None or wanted is None or len(found) != len(wanted):
        sizes = ("all tokens" if each is None else f"{len(each)} tokens" for each in (found, wanted))
        return "found projections onto {}; this recipe has {}".format(*sizes)
    ours = set(wanted)
    other = [token for token in found if token not in ours]
    return f"found {len(other)} other tokens among its {len(found)}, as {(other or found)[0]}"


def save_heads(directory: str | Path, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `heads.safetensors` and `heads.json`, each under a temporary name that is renamed when complete.

    Args:
        directory: made if missing.
        state_dict: of `MedusaHeads`, whole tensors; with its `token_map` where projections have one.
        meta: `base_model`, `revision` (or None), `num`, `layers`, `lm_head`, `hidden_size`, `vocab_size` and `recipe`
            (YAML text). Format version, dtype and the checksum that ties the two files together are added.
    """
    assert set(meta) == set(_META), f"meta has {sorted(meta)}, not {sorted(_META)}"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    dtype = str(next(t for t in tensors.values() if t.is_floating_point()).dtype).removeprefix("torch.")
    temporary = directory / f".{_TENSORS}.tmp"
    save_file(tensors, temporary)
    config = {"format_version": FORMAT_VERSION, **meta, "dtype": dtype, "sha256": _sha256(temporary)}
    (directory / f".{_CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (_TENSORS, _CONFIG):
        with open(directory / f".{name}.tmp", "rb") as file:
            os.fsync(file.fileno())
        os.replace(directory / f".{name}.tmp", directory / name)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_heads(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_heads` wrote.

    Args:
        directory: the heads' folder, or the output directory that has them in `heads/`.

    Returns:
        The config, and the state dict of the matching `MedusaHeads` on the CPU.

    Raises:
        UserError: missing, of another format, damaged, or with tensors that its own config does not describe.
    """
    directory = Path(directory)
    if not (directory / _CONFIG).exists() and (directory / "heads" / _CONFIG).exists():
        directory = directory / "heads"
    config, path = read_json(directory / _CONFIG), directory / _TENSORS
    _check_config(config, directory / _CONFIG)
    try:
        if _sha256(path) != config["sha256"]:
            raise UserError(f"{path}: damaged, its SHA-256 is not the one in {_CONFIG}; save the heads again")
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the output of a finished run") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); save the heads again") from None
    token_map = tensors.get("token_map")
    if token_map is not None:
        check_token_map(token_map, config["vocab_size"], path)
        if config["lm_head"] == "shared":
            raise UserError(f"{path}: token_map beside lm_head: shared, which has no rows of its own; save them again")
        token_map = torch.empty_like(token_map, device="meta")
    with torch.device("meta"):
        shape = {key: config[key] for key in ("num", "layers", "hidden_size", "vocab_size")}
        expected = MedusaHeads(**shape, own_projection=config["lm_head"] == "own", token_map=token_map).state_dict()
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unknown {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        found, wanted = tensors[name], expected[name]
        dtype = "int64" if name == "token_map" else config["dtype"]
        if found.shape != wanted.shape or str(found.dtype) != f"torch.{dtype}":
            says = f"{_CONFIG} says {list(wanted.shape)} of {dtype}"
            problems.append(f"{name} is {list(found.shape)} of {found.dtype}; {says}")
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in sorted(problems)))
    return config, tensors


def _check_config(config: Any, path: Path) -> None:
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        found = redact(repr(version))[:80]
        raise UserError(f"{path}: found format_version {found}; this version reads {FORMAT_VERSION}")
    checks = {**_META, "dtype": _text, "sha256": _text}
    wrong = [key for key, is_valid in checks.items() if not is_valid(config.get(key, ...))]
    if wrong:
        values = {key: redact(repr(config.get(key)))[:80] for key in wrong}
        raise UserError(*(f"{path}: {key}: found {values[key]}; save the heads again" for key in wrong))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
