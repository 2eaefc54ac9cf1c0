"""The training state as logical tensors: of each trainable parameter the fp32 master weight and Adam's two moments.

Whole tensors under plain names, whatever DeepSpeed makes of them (flat partitions of groups under ZeRO 1 and 2, of
parameters under ZeRO 3, on the GPU or offloaded), read and written through its public accessors. That is what makes a
checkpoint independent of ranks, ZeRO stage and offload.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import utils as ds
from torch import nn

KEYS = ("master", "exp_avg", "exp_avg_sq")


class LogicalTensors:
    """Reads and writes the state of a `DeepSpeedEngine` whose optimizer has made its states (see `MedusaEngine`).

    `gathered` is a context in which parameters are whole; what rank 0 leaves there is kept.
    """

    def __init__(self, engine: Any, gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]]) -> None:
        self.params = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
        whole = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in self.params.items()}
        self.shapes = {f"{name}/{key}": shape for name, shape in whole.items() for key in KEYS}
        self._engine, self._gathered = engine, gathered
        self._stage: int = engine.zero_optimization_stage()
        self._masters = self._unpartitioned_masters() if self._stage == 0 else {}

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, whole, fp32; under ZeRO each is a collective call, so every rank takes them all."""
        self._link()
        for name, param in self.params.items():
            for key in KEYS:
                yield f"{name}/{key}", self._read(param, key)

    def write(self, tensor: Callable[[str], torch.Tensor]) -> None:
        """Set every tensor to what `tensor(name)` gives, and the bf16 copies with them; every rank calls it."""
        self._link()
        for name, param in self.params.items():
            for key in KEYS:
                self._write(param, key, tensor(f"{name}/{key}").to(self._engine.device))
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()

    def set_adam_step(self, step: int) -> None:
        """Set Adam's count of steps, from which its bias correction follows."""
        optimizer = self._engine.basic_optimizer
        for state in optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
        if hasattr(optimizer, "ds_opt_adam"):
            _replay_bias_correction(optimizer, step)

    def _link(self) -> None:
        """ZeRO 1 and 2 tie moments to parameters after the first group's first update, when other groups have none."""
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _unpartitioned_masters(self) -> dict[int, torch.Tensor]:
        """ZeRO 0: the tensor that the optimizer updates, by id of its parameter; in fp32 the parameter itself."""
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return {id(param): param for param in self.params.values()}
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(param): master for pair in groups for param, master in zip(*pair, strict=True)}

    def _read(self, param: nn.Parameter, key: str) -> torch.Tensor:
        if self._stage == 0:
            master = self._masters[id(param)]
            return master if key == "master" else self._engine.basic_optimizer.state[master][key]
        if key == "master":
            return ds.safe_get_full_fp32_param(param)
        return ds.safe_get_full_optimizer_state(param, key)

    @torch.no_grad()
    def _write(self, param: Any, key: str, value: torch.Tensor) -> None:
        if self._stage == 0:
            self._read(param, key).copy_(value)
            if key == "master":
                param.copy_(value)
        elif self._stage < 3:
            if key == "master":
                ds.safe_set_full_fp32_param(param, value)
            else:
                ds.safe_set_full_optimizer_state(param, value, key)
        else:  # set_full fails when the ranks do not divide the elements, so this rank's padded part is cut here
            size = param.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            part = padded.narrow(0, size * dist.get_rank(), size)
            if key == "master":
                ds.safe_set_local_fp32_param(param, part)
                with self._gathered([param]):
                    param.copy_(value)
            else:
                ds.safe_set_local_optimizer_state(param, part, key)


def _replay_bias_correction(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Bring the powers of beta that DeepSpeedCPUAdam keeps for itself to a step.

    Its C++ part multiplies them up step by step in fp32 and takes `pow` after a jump, which differs in the last bits:
    a resumed run would not be exact.
    """
    groups, scratch = optimizer.param_groups, torch.zeros(1)
    scratch.grad = torch.zeros(1)
    optimizer.param_groups = [groups[0] | {"params": [scratch], "lr": 0.0}]
    for _ in range(step):
        optimizer.step()
    optimizer.param_groups = groups
    optimizer.state.pop(scratch, None)
