"""The training loop: steps, validations and checkpoints between the two ends of a run."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from medusa_ds.data.packing import Data
from medusa_ds.errors import UserError
from medusa_ds.heads.joint import Counters, metrics
from medusa_ds.training.engine import MedusaEngine
from medusa_ds.training.report import Meter, Report, heads_table
from medusa_ds.training.step import StepLeftError
from medusa_ds.training.supervisor import PATIENCE_S, Supervisor

SAVED_BYTES_PER_S = 2e8
"""What a checkpoint is taken to write until the first one has been timed (1.03 GB took 5.4 to 6.1 s)."""
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

    def __init__(self, engine: MedusaEngine, data: Data, report: Report, supervisor: Supervisor) -> None:
        self.recipe, self.steps = engine.recipe, engine.total_steps
        self.engine, self.data, self.report, self.supervisor = engine, data, report, supervisor
        lengths = data.train.lengths
        mean_context = float((lengths * lengths).sum() / lengths.sum()) / 2  # of a token, within its conversation
        self.meter = Meter(self.recipe, engine.model, engine.device, engine.world_size, mean_context)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._save_s = engine.checkpoint_bytes / SAVED_BYTES_PER_S
        self._held_out: str = data.report["held_out_fingerprint"]

    def run(self, state: dict[str, Any]) -> None:
        """Train from the engine's step to the end; `state` is what `run` saved in the checkpoint that it has resumed.

        Raises:
            SystemExit: a signal asked to stop; a checkpoint has been written.
            UserError: validations so far were of other conversations, so that nothing could be compared with them.
        """
        train, engine, supervisor = self.recipe.train, self.engine, self.supervisor
        if (before := state.get("held_out", self._held_out)) != self._held_out:
            raise UserError(
                f"{self.recipe.output}: made with other held-out conversations (fingerprint {before}, now "
                f"{self._held_out}); bring them back or choose another output"
            )
        self.before = state.get("before", {})
        supervisor.beat()
        if engine.steps_taken == 0:
            self.before = self.after = self.validate(0)
        first = engine.steps_taken
        size = (train.global_batch_size, train.micro_batch_size, engine.rank, engine.world_size)
        batches = ahead(lambda step: self.data.train.micro_batches(step, *size), range(first, self.steps))
        for step in range(first, self.steps):
            started = time.perf_counter()
            micro_batches = next(batches)
            try:
                result = engine.train_batch(micro_batches, step, supervisor.asked_to_stop, supervisor.is_short_of_time)
            except StepLeftError:
                self._leave(step)
            done, last, seconds = step + 1, step + 1 == self.steps, time.perf_counter() - started
            supervisor.pace_s = seconds + self._save_s
            values = self.meter.values(result, micro_batches, seconds)
            self.report.step(done, values)
            events = [(f"train/{key}", value, done) for key, value in values.items() if value is not None]
            engine.monitor.write_events(events)
            supervisor.beat()
            if step == first and supervisor.is_short_of_time():
                self._warn(seconds)
            length = None
            if last or (train.eval_every is not None and done % train.eval_every == 0 and not result.stop):
                self.after = self.validate(done)
                length = self.after.get("acceptance_length")
            if last or result.stop or length is not None or done % train.save_every == 0:
                self._save(length)
            if result.stop and not last:
                self._leave(done)
        if not self.after:  # resumed from the checkpoint of the last step
            self.after = self.validate(self.steps)

    def _save(self, acceptance_length: float | None = None) -> None:
        started = time.perf_counter()
        state = {"before": self.before, "data": self.data.fingerprint, "held_out": self._held_out}
        self.engine.save(state, acceptance_length)
        self._save_s = time.perf_counter() - started
        self.supervisor.beat()

    def _leave(self, done: int) -> NoReturn:
        """End after a signal, with a checkpoint of the steps done."""
        if done:
            self._save()
            self.report.say(f"stopped after step {done} with a checkpoint; the same command goes on from there")
        self.report.close()
        self.engine.close()
        sys.exit(self.supervisor.stop_status or 128 + signal.SIGTERM)

    def _warn(self, step_s: float) -> None:
        """Say at the start what a signal will cost where a step and its checkpoint outlast the launcher's patience."""
        train, micro_batch_s = self.recipe.train, step_s / self.engine.accumulation
        self.report.say(
            f"warning: a step takes about {step_s:.0f} s and a checkpoint {self._save_s:.0f} s, and {PATIENCE_S:.0f} s "
            "after Ctrl-C or SIGTERM the launcher kills what still runs: the run then leaves its step at the next "
            f"micro-batch ({micro_batch_s:.0f} s) and saves the last finished one; where these two take longer, lower "
            f"train.micro_batch_size (now {train.micro_batch_size}) or train.save_every (now {train.save_every})"
        )

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
        took = tqdm.format_interval(self.report.seconds)
        lines.append(f"time: {took} since this start; all figures in {output / 'report.html'}")
        at = shlex.quote(str(output))
        lines.append(f"next: medusa-ds generate {at} --prompt 'What is the capital of France?'")
        lines.append(f"      medusa-ds evaluate {at} --prompts FILE")
        return "\n".join(lines)
