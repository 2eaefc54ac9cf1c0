"""MedusaEngine: loss sums become weights.

One step is written out in `train_batch`: count, all-reduce the counts, forward and backward with sums over global
counts, all-reduce what was measured, step. What DeepSpeed would do silently is an error here: a step that was skipped,
a NaN on another rank, NaN gradients under ZeRO 0 (which would be written into the weights).

Checkpoints hold logical tensors (the fp32 master of each trainable parameter and Adam's two moments), read and
written through DeepSpeed's public accessors, so that a run resumes on another number of ranks, ZeRO stage or offload.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from medusa_ds import files
from medusa_ds.config.deepspeed import clips_in_adam, offload_devices, zero_settings
from medusa_ds.config.recipe import Recipe
from medusa_ds.errors import UserError, one_line
from medusa_ds.heads.files import different_maps, save_heads
from medusa_ds.heads.joint import Counters, JointModel
from medusa_ds.model.attention import moved
from medusa_ds.model.backbone import decoder_layers
from medusa_ds.model.lm_head import LmHeadAlone
from medusa_ds.model.rows import count_targets
from medusa_ds.ranks import Ranks
from medusa_ds.training import checkpoint
from medusa_ds.training import optimizer as optim
from medusa_ds.training.build import Gathered, Partitioned, build_model, complete_config, heads_meta
from medusa_ds.training.launch import announce, share_cores, start_process_group
from medusa_ds.training.memory import settle
from medusa_ds.training.state import LogicalTensors
from medusa_ds.training.step import StepLeftError, StepResult, Sums, clip, memory_hint, non_finite, norm_of

if TYPE_CHECKING:
    from medusa_ds.data.packing import MicroBatch

BuildModel = Callable[[Recipe, torch.dtype, torch.device, Partitioned | None, Gathered], JointModel]


def fetch_whole_layers(model: JointModel) -> None:
    """Have ZeRO 3 gather and free a decoder layer as one: its hooks then cost the GPU's host one call a layer.

    Losses and gradients stay what they are up to rounding. Not where layers share a parameter, which is still in use
    when the first of them frees it.
    """
    layers = [layer for each in (model.backbone, model.start) if each is not None for layer in decoder_layers(each)]
    params = [id(param) for layer in layers for param in layer.parameters()]
    if len(params) == len(set(params)):
        for layer in layers:
            deepspeed.utils.set_z3_leaf_module(layer, True)


@contextmanager
def _refused_by_deepspeed(file: str) -> Iterator[None]:
    """Name the file of a setting that DeepSpeed does not take, together with others or on this machine."""
    try:
        yield
    except (DeepSpeedConfigError, ValueError, AssertionError, NotImplementedError, ImportError, OSError) as error:
        raise UserError(f"{file}: DeepSpeed refuses it ({one_line(error)}); change or remove what it names") from error


def _prepare_nvme(config: dict[str, Any], file: str) -> None:
    """Refuse offload to NVMe where DeepSpeed cannot compile what reads and writes it, before a model is loaded."""
    keys = [key for key, device in offload_devices(config).items() if device == "nvme"]
    if keys and not AsyncIOBuilder().is_compatible():
        mend = "install libaio-dev (libaio-devel), or name its place in CFLAGS and LDFLAGS, or offload to cpu"
        key = f"zero_optimization.{keys[-1]}.device"
        raise UserError(f"{file}: {key}: found nvme, but DeepSpeed finds no libaio to compile async_io with; {mend}")
    if keys:
        announce("async_io")


class MedusaEngine:
    """A model in training on this rank's device; the schedules are those of a run of `total_steps` optimizer steps.

    Attributes:
        accumulation: micro-batches of a step on one rank.
        ds_config: what DeepSpeed was given.
        steps_taken: optimizer steps behind the current weights.
        monitor: DeepSpeed's (TensorBoard, Weights & Biases).

    Raises:
        UserError: batch sizes that do not multiply out, before anything is loaded; what `build` refuses.
    """

    def __init__(self, recipe: Recipe, total_steps: int, build: BuildModel = build_model) -> None:
        self.total_steps, on_gpu = total_steps, torch.cuda.is_available()
        self.device = start_process_group(recipe)
        self.recipe = recipe = settle(recipe, self.device)
        config = recipe.ds_config(Ranks().size, on_gpu)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ds_config = config = complete_config(config, recipe)
        with _refused_by_deepspeed(recipe.deepspeed):
            DeepSpeedConfig(config)
        _prepare_nvme(config, recipe.deepspeed)
        self.accumulation: int = config["gradient_accumulation_steps"]
        self._zero_stage, offloads_optimizer, _ = zero_settings(config)
        share_cores(on_gpu, offloads_optimizer)
        partitioned: Partitioned | None = None
        if self._zero_stage == 3:
            _alive = HfDeepSpeedConfig(config)  # while it lives, transformers builds and loads partitioned
            partitioned = partial(deepspeed.zero.Init, config_dict_or_path=config)
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        model = build(recipe, dtype, self.device, partitioned, self._gathered)
        model.one_gradient = recipe.stage == 1 and offloads_optimizer and self._zero_stage < 3
        if on_gpu and self._zero_stage == 3 and "leaf_module" not in config["zero_optimization"]:
            fetch_whole_layers(model)
        optimizer = self._optimizer(optim.parameter_groups(model, recipe.train), offloads_optimizer)
        with _refused_by_deepspeed(recipe.deepspeed):
            self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self._tensors = LogicalTensors(self._engine, self._gathered)
        self.steps_taken, self._best = 0, -math.inf
        self._best_step: int | None = None
        self._interruptible = False
        self._has_states = bool(self._engine.basic_optimizer.state)
        if self._has_states:  # made by a step without gradients, which ZeRO 0 in bf16 takes and Adam has counted
            self._tensors.set_adam_step(0)
        self.model, self.monitor = model, self._engine.monitor
        self._token_map = None if model.heads.token_map is None else model.heads.token_map.tolist()

    def train_batch(
        self,
        micro_batches: Sequence[MicroBatch],
        step: int,
        stop: Callable[[], bool] = lambda: False,
        short_of_time: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One optimizer step.

        `loss = sum_k weight_k * loss_sum_k / count_k` with sums and counts over all micro-batches of all ranks, so
        that neither depends on how the global batch is cut. A head without any row contributes nothing.

        Args:
            micro_batches: this rank's, `accumulation` of them.
            step: number of the step, from 0; learning rates, coefficient and random numbers follow from it.
            stop: whether this rank was asked to stop; every rank learns it in the result.
            short_of_time: whether one more step might not end, once asked to stop. Where any rank's did not look so
                after the last step, this one is left between two micro-batches as soon as any rank is asked to stop:
                weights and optimizer are those of the last step, and can be saved.

        Raises:
            StepLeftError: on every rank.
            NonFiniteError: a loss or gradient is not finite on any rank; no weight was changed.
            UserError: out of memory.
        """
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        recipe, num = self.recipe, self.recipe.heads.num
        torch.manual_seed(((recipe.train.seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**64)  # the most it takes
        for group in self._engine.optimizer.param_groups:
            group["lr"] = recipe.train.lr * group["lr_scale"] * optim.lr_factor(step, self.total_steps, recipe.train)
        with memory_hint(recipe):
            if not self.model.training:  # all modules of a backbone take milliseconds
                self._engine.train()
            targets = [count_targets(each.labels, each.position_ids, num, self.model.known_V) for each in micro_batches]
            weights = optim.loss_weights(step, self.total_steps, num, recipe.stage, recipe.loss)
            on_host = torch.stack([torch.stack(targets).sum(0).double(), torch.tensor(weights).double()])
            counts, weight = moved(on_host, self.device)
            dist.all_reduce(counts)
            shares = weight / counts.clamp(min=1)
            scales = shares * (self.world_size if self._zero_stage == 3 else 1)  # which averages over ranks
            loss, counters, finite = torch.zeros((), dtype=torch.float64, device=self.device), [], []
            for batch in micro_batches:
                if self._interruptible:
                    flag = torch.tensor(float(stop()), device=self.device)
                    dist.all_reduce(flag)
                    if flag:
                        raise StepLeftError
                output = self._engine(*self._on_device(batch), scales=scales)
                losses = [(k, head.loss_sum) for k, head in enumerate(output.losses) if head is not None]
                self._engine.backward(torch.stack([loss_sum for _, loss_sum in losses]).sum(), scale_wrt_gas=False)
                loss += sum(shares[k] * loss_sum.detach() for k, loss_sum in losses)
                counters.append(output.counters.double())
                finite.append(Counters(*output.counters.T).loss_sum.isfinite().all())
                if len(counters) < self.accumulation:
                    self._engine.step()
            bad = (~torch.stack(finite)).sum()
            asked, short = moved(torch.tensor([stop(), short_of_time()]), self.device)
            sums = Sums(bad=bad, asked=asked, short=short, loss=loss, counters=torch.stack(counters).sum(0))
            dist.all_reduce(sums.flat)
            sources = [batch.sources for batch in micro_batches]
            measured, grad_norm = self._step(sums, finite, sources, step)
        rates = {group["name"]: group["lr"] for group in self._engine.optimizer.param_groups}
        now = optim.coefficient(step, self.total_steps, recipe.loss)
        self._interruptible = bool(measured["short"])
        loss_value, asked_any = float(measured["loss"]), bool(measured["asked"])
        return StepResult(measured["counters"], loss_value, rates, grad_norm, now, asked_any)

    def eval_batch(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Counters (float64, CPU) of micro-batches, summed over all ranks; as many on each rank.

        Raises:
            UserError: out of memory.
        """
        self._engine.eval()
        with memory_hint(self.recipe), torch.no_grad():
            total = sum(self._engine(*self._on_device(batch)).counters.double() for batch in micro_batches)
        assert isinstance(total, torch.Tensor), "nothing to evaluate"
        dist.all_reduce(total)
        return total.cpu()

    def save(self, state: dict[str, Any], acceptance_length: float | None = None) -> Path:
        """Write a checkpoint of the steps taken so far, and remove those that are no longer kept.

        Args:
            state: what the loop needs to resume, with the data's fingerprint as `data`; JSON.
            acceptance_length: of a validation at this step; the highest so far makes this checkpoint the best.

        Raises:
            NonFiniteError: a weight is not finite.
            UserError: the checkpoint could not be written.
        """
        self._make_optimizer_states()
        if acceptance_length is not None and acceptance_length > self._best:
            self._best, self._best_step = acceptance_length, self.steps_taken
        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        own: dict[str, Any] = {"step": self.steps_taken, "best_step": self._best_step, "token_map": self._token_map}
        own["best"] = None if self._best_step is None else self._best
        own |= {"world_size": self.world_size, "zero_stage": self._zero_stage, "versions": versions}
        root, state = self._root(), {"engine": own, "loop": state}
        path = checkpoint.save(root, self.steps_taken, self._tensors.read(), state, self.checkpoint_bytes)
        checkpoint.keep(root, self.steps_taken, self._best_step, self.recipe.train.keep_last)
        return path

    def resume_newest(self, data_fingerprint: str) -> dict[str, Any]:
        """Go on from the newest whole checkpoint.

        Returns:
            What `save` was given as its state, which names the data's fingerprint in `data`; empty at a start.

        Raises:
            UserError: every checkpoint is damaged, its data differs, or its tensors are not those of this model.
        """
        reader = checkpoint.newest(self._root())
        if reader is None:
            return {}
        state, own = reader.state.get("loop", {}), reader.state.get("engine", {})
        kinds = {"step": int, "best": float | None, "best_step": int | None, "token_map": list | None}
        good = all(isinstance(own.get(key), kind) for key, kind in kinds.items())
        good = good and all(type(token) is int for token in own.get("token_map") or ())
        if not good or own["step"] != reader.step or not isinstance(state.get("before", {}), dict):
            raise UserError(f"{reader.path / 'state.json'}: not what a run writes; remove the directory")
        if state.get("data") != data_fingerprint:
            raise UserError(
                f"{reader.path}: made with other training data (fingerprint {state.get('data')}, now "
                f"{data_fingerprint}); bring the data back or choose another output"
            )
        if differ := different_maps(own.get("token_map"), self._token_map):
            raise UserError(f"{reader.path}: heads.vocab: {differ}; go back to that recipe or choose another output")
        self._load(reader)
        return state

    def _load(self, reader: checkpoint.Reader) -> None:
        shapes, found = self._tensors.shapes, reader.shapes()
        differ = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        if differ:
            name = differ[0]
            raise UserError(
                f"{reader.path}: {name}: found {found.get(name)}, the recipe's model has {shapes.get(name)} "
                f"({len(differ)} tensors differ); resume with the recipe of that run or choose another output"
            )
        self._make_optimizer_states()
        self._tensors.write(reader.tensor)
        state = reader.state["engine"]
        self.steps_taken, self._best = state["step"], -math.inf if state.get("best") is None else state["best"]
        self._best_step = state.get("best_step")
        checkpoint.keep(self._root(), self.steps_taken, self._best_step)
        self._tensors.set_adam_step(self.steps_taken)
        self._engine.global_steps = self.steps_taken
        self._engine.global_samples = self.steps_taken * self.recipe.train.global_batch_size

    def export(self, output: Path, tokenizer: Any = None) -> None:
        """Save what was trained: in stage 2 the backbone in `output/backbone`, then the heads in `output/heads`.

        The backbone is an ordinary transformers directory, in the weights' own dtype. A tokenizer is saved in both.

        Raises:
            UserError: `output` cannot be written.
        """
        with files.explained(f"{output}: the heads cannot be written", "checkpoints are whole"):
            if self.recipe.stage == 2:
                weights = self.whole_state_dict(self.model.backbone)
                if self.rank == 0:
                    backbone: Any = self.model.backbone
                    with files.replacing(output / "backbone") as work:
                        backbone.save_pretrained(work, state_dict=weights)
                        if tokenizer is not None:
                            tokenizer.save_pretrained(work)
                del weights
            weights = self.whole_state_dict(self.model.heads)
            if self.rank == 0:
                if tokenizer is not None:
                    tokenizer.save_pretrained(output / "heads")
                save_heads(output / "heads", weights, heads_meta(self.recipe))

    def close(self) -> None:
        """Wait for all ranks and end the process group."""
        dist.barrier()
        self._engine.destroy()
        dist.destroy_process_group()

    @property
    def checkpoint_bytes(self) -> int:
        """Estimate of what a checkpoint takes."""
        return int(4.04 * sum(math.prod(shape) for shape in self._tensors.shapes.values())) + (1 << 20)

    @property
    def device_name(self) -> str:
        """Name of the GPU, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def whole_state_dict(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """A module's state dict on the CPU of rank 0 (empty elsewhere), gathered one parameter at a time."""
        self._engine.empty_partition_cache()  # ZeRO-3 may still be fetching what it expects next
        copies: dict[int, torch.Tensor] = {}
        result: dict[str, torch.Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in copies:  # tied weights stay tied
                with self._gathered([tensor], modifier_rank=None):
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if self.rank == 0 else torch.empty(0)
            result[name] = copies[id(tensor)]
        return result if self.rank == 0 else {}

    def _step(
        self, sums: Sums, finite: list[torch.Tensor], sources: list[list[list[str]]], step: int
    ) -> tuple[Sums, float]:
        """Let DeepSpeed change the weights if all is finite; returns the sums on the CPU and the gradient's norm.

        Raises:
            NonFiniteError: on every rank, with step, ranks and source rows.
        """

        def check() -> None:
            if sums["bad"]:
                wrong = [rows for rows, fine in zip(sources, finite, strict=True) if not fine]
                raise non_finite("the loss", step, wrong)

        bad = sums["bad"]
        sums.to_host()
        if clips_in_adam(self.ds_config):  # a bad step changes nothing, so that the host may look at it afterwards
            parts = chain.from_iterable(self._engine.optimizer.averaged_gradients.values())
            clipped = clip(self._engine.basic_optimizer, parts, self.recipe.train.max_grad_norm, bad)
            norms = Sums(norm=clipped).to_host()
            self._engine.step()  # which the GPU still takes while the host prepares the next one
            norm = float(norms.wait()["norm"])
            check()
        else:
            sums.wait()
            check()
            if self._zero_stage == 0:  # there DeepSpeed neither reports the norm nor stops at a NaN
                norm = float(norm_of(p.grad for p in self._tensors.params.values() if p.grad is not None))
                if not math.isfinite(norm):
                    raise non_finite("the gradient", step, sources)
            self._engine.step()
            norm = norm if self._zero_stage == 0 else float(self._engine.get_global_grad_norm() or 0.0)
        if not self._engine.was_step_applied() or not math.isfinite(norm):
            raise non_finite("the gradient", step, sources)
        self._has_states = True
        self.steps_taken = step + 1
        return sums, norm

    def _on_device(self, batch: MicroBatch) -> list[torch.Tensor | None]:
        parts = (batch.input_ids, *(batch.hidden or ()))  # labels and positions: the model finds its rows on the CPU
        ids, *hidden = [None if part is None else moved(part, self.device) for part in parts]
        return [ids, batch.labels, batch.position_ids, *hidden]

    def _gathered(self, params: Iterable[Any], modifier_rank: int | None = 0) -> AbstractContextManager[Any]:
        if self._zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(params), modifier_rank=modifier_rank)

    def _optimizer(self, groups: list[dict[str, Any]], offloaded: bool) -> torch.optim.Optimizer:
        train = self.recipe.train
        options: dict[str, Any] = {"lr": 0.0, "betas": tuple(train.betas), "eps": train.eps}
        if offloaded:
            announce("cpu_adam")
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return torch.optim.AdamW(groups, fused=True, **options)

    def _make_optimizer_states(self) -> None:
        """Adam's states exist from the first step on: take one without gradient at rate 0, which changes no weight."""
        if self._has_states:
            return
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        length = self.recipe.heads.num + 2
        empty = torch.zeros(self.recipe.train.micro_batch_size, length, dtype=torch.int64, device=self.device)
        inputs = [empty, torch.full_like(empty, -100), torch.arange(length, device=self.device).expand_as(empty)]
        if isinstance(self.model.backbone, LmHeadAlone):
            hidden_size = self.model.backbone.config.get_text_config().hidden_size
            inputs += [torch.zeros(0, hidden_size, device=self.device), empty.flatten()]
        self._engine.train()
        for _ in range(self.accumulation):
            output = self._engine(*inputs)
            self._engine.backward(torch.stack([head.loss_sum for head in output.losses if head is not None]).sum() * 0)
            self._engine.step()
        self._has_states = True
        self._tensors.set_adam_step(0)

    def _root(self) -> Path:
        return Path(self.recipe.output) / "checkpoints"
