"""The training loop: steps, validations and checkpoints between the two ends of a run."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import Data, MicroBatch
from medusa_ds.heads.joint import Counters, metrics
from medusa_ds.training.engine import MedusaEngine
from medusa_ds.training.report import Meter, Report, heads_table, shorten
from medusa_ds.training.supervisor import Supervisor

Made = TypeVar("Made")


def ahead(make: Callable[[int], Made], steps: Sequence[int]) -> Iterator[Made]:
    """What `make` gives for each step, made by a thread one step ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = [pool.submit(make, step) for step in steps[:1]]
        for step in steps[1:]:
            coming.append(pool.submit(make, step))
            yield coming.pop(0).result()
        for last in coming:
            yield last.result()


class Loop:
    """Steps, validations and checkpoints of a run."""

    def __init__(
        self, recipe: Recipe, engine: MedusaEngine, data: Data, report: Report, supervisor: Supervisor, steps: int
    ) -> None:
        self.recipe, self.engine, self.data, self.report = recipe, engine, data, report
        self.supervisor, self.steps = supervisor, steps
        lengths = data.train.lengths
        mean_context = float((lengths * lengths).sum() / lengths.sum()) / 2  # of a token, within its conversation
        self.meter = Meter(recipe, engine.model, engine.device, engine.world_size, mean_context)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def run(self, state: dict[str, Any]) -> None:
        """Train from the engine's step to the end.

        Args:
            state: what `run` saved in the checkpoint that the engine has resumed; empty at the start.

        Raises:
            SystemExit: a signal asked to stop; a checkpoint has been written.
        """
        train, engine = self.recipe.train, self.engine
        self.before = state.get("before", {})
        self.supervisor.start()
        if engine.steps_taken == 0:
            self.before = self.after = self.validate(0)
        batches = self._batches()
        for step in range(engine.steps_taken, self.steps):
            started = time.perf_counter()
            micro_batches = next(batches)
            result = engine.train_batch(micro_batches, step, stop=self.supervisor.stop_status is not None)
            done, last = step + 1, step + 1 == self.steps
            values = self.meter.values(result, micro_batches, time.perf_counter() - started)
            self.report.step(done, values)
            events = [(f"train/{key}", value, done) for key, value in values.items() if value is not None]
            engine.monitor.write_events(events)
            self.supervisor.beat()
            length = None
            if last or (train.eval_every is not None and done % train.eval_every == 0 and not result.stop):
                self.after = self.validate(done)
                length = self.after.get("acceptance_length")
            if last or result.stop or length is not None or done % train.save_every == 0:
                engine.save({"before": self.before, "data": self.data.fingerprint}, length)
                self.supervisor.beat()
            if result.stop and not last:
                self.report.say(f"stopped after step {done} with a checkpoint; the same command goes on from there")
                self.report.close()
                engine.close()
                sys.exit(self.supervisor.stop_status or 128 + signal.SIGTERM)
        if not self.after:  # resumed from the checkpoint of the last step
            self.after = self.validate(self.steps)

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of the steps to take."""
        train, engine = self.recipe.train, self.engine
        size = (train.global_batch_size, train.micro_batch_size, engine.rank, engine.world_size)
        make = lambda step: self.data.train.micro_batches(step, *size)  # noqa: E731
        return ahead(make, range(engine.steps_taken, self.steps))

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out conversations, recorded; empty when there are none."""
        sequences = self.data.validation
        if not len(sequences):
            return {}
        engine, micro = self.engine, self.recipe.train.micro_batch_size
        size = micro * engine.world_size
        counters = torch.zeros(self.recipe.heads.num + 1, len(Counters._fields), dtype=torch.float64)
        for index in range(sequences.steps_per_epoch(size)):
            counters += engine.eval_batch(sequences.micro_batches(index, size, micro, engine.rank, engine.world_size))
            self.supervisor.beat()
        values = metrics(counters)
        self.report.record({"kind": "validation", "step": step, **values})
        losses = ", ".join(f"head {k} loss {values[f'head{k}_loss']:.3f}" for k in range(1, self.recipe.heads.num + 1))
        self.report.say(f"validation at step {step}: {losses}, acceptance length {values['acceptance_length']:.3f}")
        engine.monitor.write_events([(f"validation/{key}", value, step) for key, value in values.items()])
        return values

    def summary(self, output: Path) -> str:
        """What a user wants to know at the end: what was gained, where it is, what to do next."""
        lines = [heads_table(self.before, self.after, self.recipe.heads.num)] if self.before else []
        lines.append(f"heads saved in {output / 'heads'}")
        if self.recipe.stage == 2:
            lines.append(f"tuned backbone saved in {output / 'backbone'}")
        lines.append(f"next: medusa-ds generate {shorten(output)} --prompt 'What is the capital of France?'")
        return "\n".join(lines)
