"""A step compiled in parts: the code of one layer serves all layers, so compiling takes as long for 32 as for one.

Dynamo takes a module's weights as inputs of the code, and compiles again only where something differs that the code
depends on. The layers' cache would differ, as each asks for its own by number; so while the parts are in use, the cache
is told before each layer whose turn it is.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PreTrainedModel

from medusa_ds.decoding.session import Session, layout_of
from medusa_ds.errors import UserError
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import cache_directory


def compile_part(part: Callable[..., Any], one_row: bool) -> Callable[..., Any]:
    """A part of the step, compiled for the shapes that it is called with.

    `one_row`: whether its products multiply one row of each text, as those of a plain step do.
    """
    torch._dynamo.config.recompile_limit = 256  # one compilation a tree and session, over all decoders
    options: dict[str, Any] = {
        "coordinate_descent_tuning": one_row,  # then products are reductions, which read weights faster than cuBLAS
        "combo_kernels": True,  # rotates queries and keys and writes both into the cache at once
        "triton.enable_pdl": True,  # a kernel starts while the one before ends, where the GPU can do that
    }
    known = torch._inductor.list_options()  # an older PyTorch refuses others
    return torch.compile(part, dynamic=False, options={name: on for name, on in options.items() if name in known})


def keep_compiled_code() -> None:
    """Keep what is compiled for the next start: in our cache, if that can be written and nobody names a place."""
    with suppress(OSError):
        (kept := cache_directory() / "compiled").mkdir(parents=True, exist_ok=True)
        own = default_cache_dir()  # which importing PyTorch's compiler writes into the environment
        if os.access(kept, os.W_OK | os.X_OK) and os.environ.get("TORCHINDUCTOR_CACHE_DIR", own) == own:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)


class CompiledBackbone:
    """Compiled stand-ins for a backbone's layers, rotary embedding and norm.

    Args:
        backbone: a causal language model of transformers, none of whose modules has a `forward` of its own or a class
            of Liger's, which replaces both.
        one_row: see `compile_part`.

    Raises:
        UserError: the model does not run `layers`, each with keys and values of its own, one after another.
    """

    def __init__(self, backbone: PreTrainedModel, one_row: bool) -> None:
        own = [m for m in backbone.modules() if "forward" in vars(m) or type(m).__module__.startswith("liger_kernel")]
        assert not own, "patched, as Liger does"
        base = base_model(backbone)
        self._layers = list(getattr(base, "layers", ()))
        if not self._layers or len(self._layers) != len(layout_of(backbone).kept):
            kind = backbone.config.model_type
            raise UserError(f"--compile: {kind} does not run a list of layers one after another; leave --compile out")
        keep_compiled_code()
        single = [m for m in base.children() if not isinstance(m, nn.ModuleList | nn.Embedding)]
        self._forward = {module: compile_part(module.forward, one_row) for module in [*self._layers, *single]}

    @contextmanager
    def installed(self, session: Session) -> Iterator[None]:
        """While entered, the backbone runs compiled parts, on this session's cache."""
        for module, forward in self._forward.items():
            module.forward = forward
        for layer, slots in zip(self._layers, session.cache.layers, strict=True):
            layer.forward = _in_turn(session.cache, slots, layer.forward)
        try:
            yield
        finally:
            session.cache.current = None
            for module in self._forward:
                del module.forward


def _in_turn(cache: Any, slots: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        cache.current = slots
        return forward(*args, **kwargs)

    return run
