"""`medusa-ds bench` on a tiny model and a CPU: what it refuses, what it writes, and how a trace becomes a table."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from medusa_ds.benchmarks import processes, report, trace, worker
from medusa_ds.benchmarks.batches import load_conversations, make_feed
from medusa_ds.benchmarks.cases import IMPLS, Case, matrix
from medusa_ds.benchmarks.head import measure_head
from medusa_ds.cli import main
from medusa_ds.errors import UserError
from medusa_ds.model.rows import count_targets
from medusa_ds.programs import bench

TINY = """\
model:
  name: tiny
  init: random
  config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, vocab_size: 307,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 8192, initializer_range: 0.2}
stage: 1
data: {path: sample}
train: {global_batch_size: 2, lr: 1e-3}
output: out
"""


@pytest.fixture(autouse=True)
def place(place):
    (place / "tiny.yaml").write_text(TINY)
    return place


SMALL = Case(
    "tiny.yaml", (), "step", stage=1, heads=2, sequence=24, batch=2, impl="original", zero="zero2", warmup=1, steps=2
)


def case(**changes):
    return replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--part", "stpe"], "--part: found 'stpe'; allowed is step, head, chat or epochs"),
        (["--impl", "ours,theirs"], "--impl: found 'theirs'; allowed is ours, ours_fp8"),
        (["tiny.yaml", "--sequence", "24", "--impl", "ours,cached"], "--impl: found cached, of which"),
        (["--stage", "3"], "--stage: found '3'; allowed is 1 or 2"),
        (["--heads", "3,many"], "--heads: found 'many'; allowed is a whole number"),
        (["--sequence", "8", "--heads", "5"], "data.max_length"),
        (["--heads", "17"], "heads.num"),
        (["--zero", "zero7"], "zero7.json"),
        (["tiny.yml"], "tiny.yml: no such recipe file"),
        (["tiny.yaml", "train.lrr=1"], "did you mean lr?"),
        (["tiny.yaml", "--json", "tiny.yaml/x.json"], "--json: tiny.yaml/x.json: cannot be written"),
        (
            ["tiny.yaml", "--pictures", "tiny.yaml"],
            "--pictures: tiny.yaml: cannot be written (tiny.yaml is no directory",
        ),
        (["tiny.yaml", "--profile", "tiny.yaml/x"], "--profile: tiny.yaml/x: cannot be written"),
    ],
)
def test_misuse_is_a_line(argv, fragment, refused):
    assert fragment in refused("bench", *argv)


def cases_of(**chosen):
    """Of steps in both stages, by the originals and by us unless told otherwise."""
    common = {"parts": ["step"], "stages": [1, 2], "impls": ["ours", "original"], "gpus": [1], "zeros": None}
    return matrix("tiny.yaml", (), warmup=1, steps=1, **(common | chosen))


def test_the_default_is_the_originals_matrix():
    cases = cases_of(heads=[3, 5], sequences=[1024, 8192], batch=6, impls=IMPLS)
    assert len(cases) == 2 * 2 * (5 + 4)
    assert {(one.stage, one.zero) for one in cases} == {(1, "zero2"), (2, "zero3")}
    assert {one.impl for one in cases if one.stage == 2} == {"ours", "eager", "original", "torch_linear_ce"}
    second = next(one for one in cases if one.stage == 2).load_recipe()
    assert second.heads.init_from is None and second.train.activation_checkpointing
    assert case(impl="eager", overrides=("loss.chunk_mib=512",)).load_recipe().loss.chunk_mib == 1024  # has no chunks


def test_the_cases_that_matter_most_come_first():
    """Most GPUs, then one; what differs in one choice from the first before what differs in two. Mutation: no order."""
    cases = cases_of(heads=[3, 5], sequences=[24, 48], batch=2, gpus=[1, 2, 4, 8])
    assert len(cases) == 2 * 2 * 2 * (4 + 1)
    key = [(one.stage, one.heads, one.sequence, one.impl, one.gpus) for one in cases]
    assert key[:2] == [(1, 3, 24, "ours", 8), (2, 3, 24, "ours", 8)]
    assert set(key[2:8]) == {
        (stage, *rest) for stage in (1, 2) for rest in ((3, 24, "ours", 1), (3, 48, "ours", 8), (5, 24, "ours", 8))
    }
    assert key.index((1, 3, 24, "original", 1)) < key.index((1, 3, 24, "ours", 2))
    assert set(key[-2:]) == {(1, 5, 48, "ours", 2), (2, 5, 48, "ours", 2)}


def test_stage_2_is_measured_with_several_zero_configs():
    """Mutation: the same for stage 1, or for the original, which has no ZeRO."""
    cases = cases_of(heads=[2], sequences=[24], batch=2, zeros=["auto", "zero3"])
    assert {(one.stage, one.impl, one.zero) for one in cases} == {
        (1, "ours", "auto"),
        (2, "ours", "auto"),
        (2, "ours", "zero3"),
        (1, "original", "zero2"),
        (2, "original", "zero3"),
    }
    recipe = next(one for one in cases if one.stage == 2 and one.zero == "auto").load_recipe()
    assert (recipe.deepspeed, recipe.train.activation_checkpointing) == ("auto", "auto")
    asked = replace(cases[0], stage=2, overrides=("train.activation_checkpointing=false",))
    assert asked.load_recipe().train.activation_checkpointing is False


class FakeWorkers:
    """Cases that take no time; the one named in `last` is cut off by a signal."""

    running: list["FakeWorkers"] = []
    traces: list[str] = []
    last, number = "", signal.SIGTERM

    def __init__(self, case, trace=None):
        self.case = case
        self.running.append(self)
        self.traces += [trace.name] if trace else []

    def measure(self, timeout_s):
        if self.case is None:
            versions = {"torch": "2.11"}
            machine = {"device": "x", "gpus": 2, "impls": ["ours"], "matmul_tflops": 1.0, "copy_gb_per_s": 1.0}
            return machine | {"versions": versions}
        if f"{self.case.gpus} {self.case.sequence}" == self.last:
            os.kill(os.getpid(), self.number)
        return FIGURES | {"tokens_per_s": 10.0 * self.case.gpus, "supervised_tokens_per_s": 9.0 * self.case.gpus}

    def close(self):
        self.running.remove(self)


FIGURES = {"median_s": 1.0, "min_s": 1.0, "max_s": 1.0, "tflops": 0.5, "flops": 5e11, "tokens": 10.0}
FIGURES |= {"peak_allocated_gib": 1.0, "peak_reserved_gib": 2.0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_cut_off_keeps_what_it_has(place, monkeypatch, capsys, number):
    """Its table, its pictures, and no process. Mutations: write the report at the end, or close the next ones alone."""
    monkeypatch.setattr(bench, "Workers", FakeWorkers)
    monkeypatch.setattr(FakeWorkers, "last", "1 48")
    monkeypatch.setattr(FakeWorkers, "number", number)
    before = signal.getsignal(number)
    options = "--heads 2 --sequence 24,48 --batch 2 --impl ours --gpus 1,2,4,8 --pictures drawn --json made/bench.json"
    options += " --profile traces"
    with pytest.raises(SystemExit) as stop:
        main(["bench", "tiny.yaml", *options.split()])
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert FakeWorkers.running == []
    assert "step_stage1_heads2_2x24_ours_2gpus.json" in FakeWorkers.traces
    out, err = capsys.readouterr()
    assert "left out, as this machine has 2: all cases of 4 GPUs" in out and "all cases of 8 GPUs" in out
    assert "ending with what was measured" in err
    results = json.loads((place / "made" / "bench.json").read_text())["results"]
    assert [(result["gpus"], result["sequence"]) for result in results] == [(2, 24), (1, 24), (2, 48)]
    assert results[0]["times_one_gpu"] == 2.0
    assert sum(line.startswith("step ") and line.endswith(" 2.00") for line in out.splitlines()) == 1
    assert (place / "drawn" / "scaling.svg").exists()


def test_a_machine_without_any_of_the_gpus_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(bench, "Workers", FakeWorkers)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "tiny.yaml", "--heads", "2", "--sequence", "24", "--impl", "ours", "--gpus", "8"])
    assert stop.value.code == 2 and "no case could be measured" in capsys.readouterr().err


def test_ours_takes_the_steps_of_the_original(place):
    """Mutation: leave the residual blocks or a head out of the original, or weigh its heads otherwise."""
    cases = [case(overrides=("train.warmup_ratio=0",), impl=impl, zero="auto") for impl in ("ours", "original")]
    ours, original = (worker.measure_step(one, None, place) for one in cases)
    assert (ours["trained_with"], original["trained_with"]) == ("zero2, recomputed: False", None)
    assert ours["losses"] == pytest.approx(original["losses"], rel=1e-5)
    assert len(ours["losses"]) == 3 and ours["losses"][2] != ours["losses"][1]
    for result in (ours, original):
        assert len(result["seconds"]) == 2
        assert result["min_s"] <= result["median_s"] <= result["max_s"]
        assert result["supervised"] == 2 * (24 - 2) and result["tokens"] == 48


def test_a_case_on_two_ranks_is_reported(place, monkeypatch, capsys):
    """The batch is each rank's, tokens are of both. Mutation: leave the other rank's out."""
    monkeypatch.setattr(bench, "Workers", lambda *case: processes.Workers(*case) if case[0] else FakeWorkers(None))
    options = "--heads 2 --sequence 24 --batch 2 --warmup 1 --steps 2 --impl ours,ours_fp8 --gpus 2"
    main(["bench", "tiny.yaml", *options.split()])
    out = capsys.readouterr().out
    assert "left out, as this machine or its PyTorch cannot: step: stage 1, 2 heads, 2 x 24, ours_fp8" in out
    (two,) = json.loads((place / "bench.json").read_text())["results"]
    assert (two["impl"], two["zero"], two["gpus"], two["tokens"], two["supervised"]) == ("ours", "zero2", 2, 96, 88)
    assert two["of_ceiling"] > 0 and f"{two['supervised_tokens_per_s']:.0f}" in out


def test_a_machine_is_measured_where_there_is_no_case(place):
    (place / "case.json").write_text("{}")
    worker.main("case.json", "result.json")
    machine = json.loads((place / "result.json").read_text())
    assert machine["matmul_tflops"] > 0 and machine["copy_gb_per_s"] > 0 and machine["versions"]["torch"]
    assert "ours" in machine["impls"] and "ours_fp8" not in machine["impls"]


def test_stage_2_and_the_loss_of_one_head_in_this_process(place):
    result = worker.measure_step(case(stage=2, zero="zero0"), place / "trace.json", place)
    assert result["supervised"] == 44 and result["tflops"] > 0
    assert result["profile"]["step_ms"] > 0 and (place / "trace.json").exists()
    shown = {
        "machine": {"device": "cpu", "matmul_tflops": 1.0, "copy_gb_per_s": 1.0},
        "results": [asdict(case()) | result],
    }
    report.compare(shown)
    text = report.describe(shown)  # of a GPU's bf16, and of where its time goes, a CPU can say nothing
    assert "fp32 matrix product" in text and "idle" not in text
    head = measure_head(case(part="head"))
    assert head["rows"] == 48 and head["ways"]["ours"]["median_ms"] > 0


def test_heads_of_fewer_tokens_learn_from_every_position(place):
    """Mutation: draw tokens that these heads do not know; heads of all tokens."""
    chosen = {"impl": "ours", "zero": "zero0"}
    whole, fewer = (
        worker.measure_step(case(overrides=(f"heads.vocab={vocab}",), **chosen), None, place) for vocab in ("full", 64)
    )
    assert fewer["supervised"] == whole["supervised"] == 44 and fewer["flops"] < whole["flops"]
    assert fewer["losses"][0] < whole["losses"][0]
    assert case(overrides=("heads.vocab=64",)).load_recipe().heads.vocab == "full"  # the original's


def test_several_gpus_are_compared_with_one_and_with_the_original():
    """Mutation: forget to divide by the number of GPUs."""
    results = [
        asdict(case(impl=impl, gpus=gpus)) | {"median_s": 1.0, "supervised_tokens_per_s": speed, "tflops": tflops}
        for impl, gpus, speed, tflops in (("ours", 1, 30.0, 6.0), ("ours", 2, 57.0, 12.0), ("original", 1, 20.0, 4.0))
    ]
    report.compare({"machine": {"matmul_tflops": 10.0}, "results": results})
    assert [result.get("times_original") for result in results] == [1.5, 57 / 40, 1.0]
    assert [result.get("times_one_gpu") for result in results] == [None, 1.9, None]
    assert [result["of_ceiling"] for result in results] == [0.6, 0.6, 0.4]


def test_figures_of_ranks_are_the_slowest_ones_and_sums():
    alike = {"tokens": 8.0, "peak_reserved_gib": None}
    found = worker._of_all(
        [
            alike | {"seconds": [1.0, 4.0], "startup_s": 2.0, "rows": [5, 3], "peak_allocated_gib": 1.0},
            alike | {"seconds": [2.0, 3.0], "startup_s": 1.0, "rows": [6, 1], "peak_allocated_gib": 0.5},
        ]
    )
    wanted = {"seconds": [2.0, 4.0], "startup_s": 2.0, "rows": [11, 4], "tokens": 16.0, "peak_allocated_gib": 1.0}
    assert found == wanted | {"peak_reserved_gib": None}


def test_a_rank_that_fails_ends_the_others(place):
    """Mutation: wait for every rank."""
    started = time.monotonic()
    command = [sys.executable, "-c", "import os, time; os.environ['RANK'] == '1' and exit(3); time.sleep(60)"]
    assert processes._end(processes._start(command, 2, place / "log.txt"), 30) == 3
    assert processes._end(processes._start(command, 1, place / "log.txt"), 1) is None
    assert time.monotonic() - started < 20


def chats_of(model, conversations):
    return f"model.name={model}", "model.init=pretrained", "model.config={}", f"data.path={conversations}"


def test_epochs_from_the_cache_beside_the_originals(place, tiny_model, conversations):
    """Whole epochs, with the filling; the original's are computed. Mutation: leave `startup_s` out of the whole."""
    overrides = (*chats_of(tiny_model, conversations), "heads.vocab=128", "train.warmup_ratio=0", "train.lr=1e-2")
    given = {"overrides": overrides, "part": "epochs", "sequence": 64}
    found = {impl: worker.measure_step(case(**given, impl=impl), None, place) for impl in ("original", "cached_vocab")}
    data, _ = load_conversations(case(**given).load_recipe())
    original, cached = found["original"], found["cached_vocab"]
    assert (place / "hidden" / "manifest.json").exists()
    assert cached["num_steps"] == len(cached["losses"]) == 3 * data.train.steps_per_epoch(2)
    assert original["num_steps"] == 3 * -(-len(data.train.rows) // 2) > cached["num_steps"]
    assert cached["total_s"] == pytest.approx(cached["startup_s"] + sum(cached["seconds"]))
    assert original["total_s"] == pytest.approx(original["startup_s"] + original["num_steps"] * original["median_s"])
    counts = count_targets(*(torch.tensor(part)[None] for part in every_conversation(data)), 1)
    for result in found.values():
        whole = result["supervised_tokens_per_s"] * result["total_s"]
        assert whole == pytest.approx(3 * int(counts[1])) == pytest.approx(result["supervised"] * result["num_steps"])
    assert cached["losses"][-1] < cached["losses"][0]


def every_conversation(data):
    """Labels and positions of the training split, one conversation after another."""
    examples = [data.train.example(number).labels for number in range(len(data.train.rows))]
    return [label for labels in examples for label in labels], [at for labels in examples for at in range(len(labels))]


def test_conversations_are_padded_for_the_original(tiny_model, conversations):
    """One a sequence, labels where the assistant speaks."""
    recipe = case(overrides=chats_of(tiny_model, conversations), part="chat", sequence=64)
    data, _ = load_conversations(recipe.load_recipe())
    padded, packed = (
        [make_feed(one, data, 300, 0)(step) for step in range(4)] for one in (recipe, replace(recipe, impl="ours"))
    )
    assert padded[0].input_ids.shape == packed[0].input_ids.shape == (2, 64)
    share = [sum(int((b.labels >= 0).sum()) for b in batches) for batches in (padded, packed)]
    assert 0 < share[0] < share[1], "packing holds more supervised tokens"
    assert all((b.position_ids == torch.arange(64)).all() for b in padded)


def test_out_of_memory_is_a_result_and_other_errors_are_not(place, monkeypatch):
    def fail(error):
        def measure(*_):
            raise error

        return measure

    (place / "case.json").write_text(json.dumps(asdict(case())))
    out = UserError("out of memory; lower train.micro_batch_size")
    out.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(worker, "measure_step", fail(out))
    with pytest.raises(SystemExit):
        worker.main("case.json", "result.json")
    result = json.loads((place / "result.json").read_text())
    assert list(result) == ["out_of_memory"]
    assert "out of memory" in report.describe(
        {"machine": {"device": "x", "matmul_tflops": 1.0, "copy_gb_per_s": 1.0}, "results": [asdict(case()) | result]}
    )
    monkeypatch.setattr(worker, "measure_step", fail(UserError("no such model")))
    with pytest.raises(UserError, match="no such model"):
        worker.main("case.json", "result.json")


def test_a_kernel_belongs_to_the_innermost_range_that_launched_it():
    def event(cat, name, ts, dur, correlation=None):
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("user_annotation", "whole step", 0, 10_000),
        event("user_annotation", "backbone", 0, 100),
        event("user_annotation", "head 1", 100, 100),
        event("user_annotation", "head 1 projection", 150, 50),
        event("cpu_op", "autograd::engine::evaluate_function: X", 300, 100),
        event("user_annotation", "Optimizer.step#AdamW.step", 500, 100),
        *(
            event("cuda_runtime", "cudaLaunchKernel", ts, 1, n)
            for n, ts in enumerate((50, 120, 160, 350, 450, 550, 560))
        ),
        *(
            event("kernel", name, 1000 + 1000 * n, 500, n)
            for n, name in enumerate(("gemm", "gemm", "gemm", "add", "copy", "adam", "ncclDevKernel"))
        ),
        event("gpu_memcpy", "Memcpy", 7400, 200, 4),  # beside the last 100 of communication
    ]
    found = trace.summarize(events, ["backbone", "head 1", "head 1 projection"])
    assert found["parts"] == pytest.approx(
        {
            "backbone": 0.5,
            "head 1": 0.5,
            "head 1 projection": 0.5,
            "backward": 0.5,
            "bookkeeping": 0.7,
            "optimizer": 0.5,
            "communication, alone": 0.4,
            "communication, beside others": 0.1,
            "idle": 10 - 3.6,
        }
    )
    assert found["kernels"]["gemm"] == 1.5
    assert found["gaps"]["start to backbone"] == 1.0
    assert found["gaps"]["backbone to head 1"] == 0.5
    assert found["gaps"]["bookkeeping to end"] == pytest.approx(10 - 7.6)


def made_up(gpus, stages=(1, 2)):
    """A report of so many GPUs, each less than the ones before it."""
    speed, no_memory = FIGURES | {"supervised_tokens_per_s": 1.0}, {"out_of_memory": "yes"}
    results = [
        asdict(case(stage=stage, heads=heads, sequence=sequence, impl=impl, gpus=number, zero=zero))
        | (no_memory if impl == "eager" and sequence == 48 else speed | {"tokens_per_s": 100.0 * number**0.9 / stage})
        for stage in stages
        for heads in (3, 5)
        for sequence in (24, 48)
        for impl, zero in (("ours", "zero2"), ("eager", "zero2"), *([("ours", "auto")] if stage == 2 else []))
        for number in gpus
    ]
    machine = {"device": "H", "matmul_tflops": 700.0, "versions": {"torch": "2.11", "deepspeed": "0.19.8"}}
    return {"machine": machine, "results": results}


def test_nine_pictures_are_drawn_from_files_of_results(place, capsys):
    """Mutations: the ideal line through the most GPUs, tokens/s of a GPU, or one file alone."""
    from matplotlib import rcParams

    from medusa_ds.benchmarks import pictures
    from medusa_ds.decoding.pictures import new_figure

    for name, gpus in (("one", [1]), ("more", [2, 4, 8])):
        (place / f"{name}.json").write_text(json.dumps(made_up(gpus)))
    rcParams["svg.fonttype"] = "none"  # text as text
    main(["bench", "--draw", "one.json,more.json", "--pictures", "nine", "--json", "."])  # which is not written
    names = {
        f"{k}_stage{stage}_heads{heads}.svg" for k in ("memory", "throughput") for stage in (1, 2) for heads in (3, 5)
    }
    assert {file.name for file in (place / "nine").iterdir()} == names | {"scaling.svg"}
    assert capsys.readouterr().out.count("drew nine") == 9
    scaling, stage2 = ((place / "nine" / name).read_text() for name in ("scaling.svg", "memory_stage2_heads3.svg"))
    assert "stage 2, ours, with Liger, auto: 3 heads, 2 x 24 a GPU" in scaling
    assert "ours, with Liger, auto, 8 GPUs" in stage2 and "2 GPUs" not in stage2
    assert "ours, without Liger, 8 GPUs: no memory" in stage2 and "ours, with Liger, auto, 8 GPUs: no" not in stage2
    for text in (scaling, stage2):
        assert "H, torch 2.11, deepspeed 0.19.8" in text
    axes = new_figure(6, 4).subplots()
    pictures._scaling(axes, {"line": {1: 100.0, 8: 650.0}}, "H")
    real, ideal = axes.get_lines()
    assert (list(real.get_xdata()), list(real.get_ydata())) == ([1, 8], [100.0, 650.0])
    assert list(ideal.get_ydata()) == [100.0, 800.0]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{}", "no results"),
        (json.dumps(made_up([2]) | {"machine": {"device": "other"}}), "found another GPU than in one.json"),
    ],
)
def test_reports_that_cannot_be_drawn_together_are_a_line(text, fragment, place, refused):
    (place / "one.json").write_text(json.dumps(made_up([1])))
    (place / "two.json").write_text(text)
    assert f"--draw: two.json: {fragment}" in refused("bench", "--draw", "one.json,two.json", "--pictures", "nine")
