"""The training program as users run it: the stock launcher, real DeepSpeed, a tiny model."""

import json
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
from forks import free_port
from support import SIZES, cli, launch, launched, losses_of, metrics_of, train
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from medusa_ds.config.recipe import Recipe
from medusa_ds.errors import UserError
from medusa_ds.heads.files import load_heads
from medusa_ds.programs.train import _claim, _is_free, _run, _shipped, main
from medusa_ds.ranks import Ranks
from medusa_ds.training.checkpoint import Reader


def test_recipe_trains_heads_and_says_where_they_are(tiny_recipe, tmp_path):
    text = launched(tiny_recipe, "train.steps=30", "train.save_every=100", log_dir=tmp_path)
    out = tmp_path / "out"
    first, last = metrics_of(out, "validation")
    assert all(last[f"head{k}_loss"] < first[f"head{k}_loss"] for k in (1, 2, 3))
    assert last["acceptance_length"] > first["acceptance_length"]
    assert f"{first['acceptance_length']:.3f} -> {last['acceptance_length']:.3f}" in text
    assert "heads saved in out/heads" in text.replace(f"{tmp_path}/", "")
    assert "time: 00:" in text and f"next: medusa-ds generate {out}" in text
    assert text.index("heads saved in") < text.index(f"medusa-ds evaluate {out} --prompts FILE")
    config = json.loads((out / "heads" / "heads.json").read_text())
    assert (config["num"], config["layers"], config["lm_head"]) == (3, 1, "own")
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 31))
    told = "loss head1_loss head3_acc full_acc_2 cond_acc_3 lr_heads grad_norm tokens_per_s supervised_tokens_per_s mfu"
    assert {*told.split()} <= lines[0].keys()
    launch_line = json.loads((out / "launches.jsonl").read_text())
    assert launch_line["versions"]["deepspeed"] and launch_line["ranks"] == 1
    assert "train.steps=30" in launch_line["command"]
    again = train(tiny_recipe, "train.steps=30", "train.save_every=100", log_dir=tmp_path)
    assert "holds a finished run" in again and f"with heads.init_from={out} to go on" in again
    assert len(metrics_of(out)) == 30


def test_a_model_with_a_state_says_what_it_cannot_and_is_trained_and_exported(tiny_recipe, tiny_model, tmp_path):
    """Mutations: pack its conversations; refuse it altogether."""
    config = Lfm2Config(**SIZES, vocab_size=300, layer_types=["conv", "full_attention"])
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "hybrid")
    text = train(tiny_recipe, f"model.name={tmp_path / 'hybrid'}", "train.steps=3", log_dir=tmp_path)
    assert "packing: one conversation a sequence, since lfm2 does not keep documents" in text
    assert "decoding: none: layers of lfm2 carry a state that cannot go back" in text
    assert len(losses_of(tmp_path / "out")) == 3
    cli("export", tmp_path / "out", tmp_path / "exported", "--for", "vllm", log_dir=tmp_path)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_a_checkpoint_holds_the_weights_whatever_order_deepspeed_would_keep_them_in(tiny_recipe, tmp_path):
    """Mutation: leave `round_robin_gradients`, with which DeepSpeed's accessors give other parameters' weights."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    train(tiny_recipe, f"deepspeed={tmp_path / 'ds.json'}", "train.steps=2", log_dir=tmp_path, ranks=2)
    saved = Reader(tmp_path / "out" / "checkpoints" / "step-000002")
    for name, weight in load_heads(tmp_path / "out")[1].items():
        assert saved.tensor(f"heads.{name}/master").equal(weight), name


def test_the_largest_seed_trains(tiny_recipe, tmp_path):
    """Fails where a step's seed has no room in 64 bits, as those of dates had none."""
    train(tiny_recipe, f"train.seed={2**32 - 1}", "train.steps=1", log_dir=tmp_path)


def test_plain_yaml_runs_as_a_module_from_any_directory(tiny_recipe, tmp_path):
    train(tiny_recipe, "train.steps=2", f"output={tmp_path / 'stub'}", log_dir=tmp_path)
    plain = tmp_path / "plain.yaml"
    plain.write_text("\n".join(tiny_recipe.read_text().splitlines()[1:-1]) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    launched(plain, "train.steps=2", f"output={tmp_path / 'plain'}", module=True, cwd=elsewhere, log_dir=tmp_path)
    assert losses_of(tmp_path / "stub") == losses_of(tmp_path / "plain")


@pytest.mark.parametrize(("key", "value"), [("loss.impl", "liger"), ("model.attention", "flex_attention")])
def test_what_a_gpu_alone_computes_is_refused_before_anything_loads(key, value, tiny_recipe, tmp_path):
    """Mutation: leave it to the model, and data has been read, and the output claimed, when it is said."""
    text = train(tiny_recipe, f"{key}={value}", log_dir=tmp_path, ends=(2,))
    assert f"error: {key}: found {value}" in text and len(text.strip().splitlines()) == 1, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--lr", "1"], "deepspeed --module medusa_ds: unrecognized arguments: --lr"),
        ([], "the following arguments are required: recipe"),
        (["none.yaml"], "none.yaml: no such recipe file"),
    ],
)
def test_misuse_of_the_command_line_is_one_line(argv, fragment, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medusa_ds", "--local_rank=0", *argv])
    with pytest.raises(SystemExit) as stop:
        main(None if argv in ([], ["none.yaml"]) else "smollm2_135m_stage1")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1 and fragment in err


def test_bad_recipe_ends_with_status_2_and_without_traceback(tiny_recipe, tmp_path):
    run = launch(tiny_recipe, "train.lr=no", "heads.numb=4", ranks=2, log_dir=tmp_path)
    assert run.wait() == 2
    assert run.text.count("error: ") == 2 and "train.lr" in run.text and "did you mean num?" in run.text
    assert "Traceback" not in run.text
    assert not (tmp_path / "out").exists()


STAGE_2 = ("stage=2", "train.lr=1e-3", "deepspeed=ds_configs/zero3.json")


def test_stage_2_trains_everything_from_stage_1(tiny_recipe, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    train(tiny_recipe, "train.steps=4", log_dir=tmp_path)
    stage2 = tmp_path / "stage2"
    asked = (*STAGE_2, f"heads.init_from={tmp_path / 'out'}", f"output={stage2}", "train.activation_checkpointing=true")
    train(tiny_recipe, *asked, "train.steps=4", ranks=2, log_dir=tmp_path)
    before, (first, last) = metrics_of(tmp_path / "out", "validation"), metrics_of(stage2, "validation")
    assert first["head1_loss"] == pytest.approx(before[-1]["head1_loss"], rel=1e-5)
    assert last["lm_loss"] < first["lm_loss"] and last["head1_loss"] < first["head1_loss"]
    rates = metrics_of(stage2)[0]
    assert rates["step"] == 1
    assert rates["lr_heads"] == pytest.approx(4 * rates["lr_backbone"])
    tuned = AutoModelForCausalLM.from_pretrained(stage2 / "backbone").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert all((tuned[name] != start[name]).any() for name in start)
    further = (f"model.name={stage2 / 'backbone'}", f"output={tmp_path / 'third'}")
    train(tiny_recipe, *STAGE_2, f"heads.init_from={stage2}", *further, "train.steps=1", log_dir=tmp_path)
    begun = metrics_of(tmp_path / "third", "validation")[0]
    assert (begun["lm_loss"], begun["head1_loss"]) == pytest.approx((last["lm_loss"], last["head1_loss"]), rel=1e-5)


def test_stage_2_towards_its_start_reports_the_labels_too(tiny_recipe, make_run, tmp_path):
    stage2 = tmp_path / "stage2"
    asked = (*STAGE_2, f"heads.init_from={make_run('out')}", f"output={stage2}", "loss.target=distribution")
    text = train(tiny_recipe, *asked, "train.steps=8", ranks=2, log_dir=tmp_path)
    first, last = metrics_of(stage2, "validation")
    assert abs(first["lm_loss"]) < 1e-5 < last["lm_loss"]
    assert first["lm_label_loss"] == pytest.approx(last["lm_label_loss"], rel=0.02)
    assert last["head1_loss"] < first["head1_loss"]
    assert f"LM, labels{first['lm_label_loss']:6.3f} -> {last['lm_label_loss']:6.3f}" in text
    assert "lm_label_loss" not in metrics_of(stage2)[0] and "lm_loss" in metrics_of(stage2)[0]
    assert not (stage2 / "start").exists()


def test_signal_to_the_launcher_leaves_one_whole_checkpoint_and_nothing_running(tiny_recipe, tmp_path):
    """Turns red when the supervisor does not watch the launcher: its ranks train on as orphans.

    Until then no other run may write there. Mutation: let the lock go when the output has been looked at.
    """
    overrides = ("train.steps=3000", "train.save_every=1000", "train.eval_every=1000")
    run = launch(tiny_recipe, *overrides, ranks=2, log_dir=tmp_path)
    run.wait_for("step 1/3000")
    with ExitStack() as stack, pytest.raises(UserError, match=r"in use by host \S+ pid \d+; wait for that run"):
        _claim(tmp_path / "out", Recipe.load(tiny_recipe, overrides), stack)
    tree = psutil.Process(run.process.pid).children(recursive=True)
    run.process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=240)
    assert not alive, run.text
    assert run.wait() != 0
    done = len(metrics_of(tmp_path / "out"))
    checkpoints = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    assert checkpoints == [f"step-{done:06d}"], (checkpoints, run.text)


SLOW = """
import time
from medusa_ds.train import main
from medusa_ds.training import engine, supervisor

supervisor.PATIENCE_S = 2.0
move = engine.MedusaEngine._on_device
engine.MedusaEngine._on_device = lambda self, batch: time.sleep(1.2) or move(self, batch)
main({recipe!r})
"""


def test_ctrl_c_in_slow_steps_saves_the_last_finished_one_though_the_pipe_is_gone(tiny_recipe, tmp_path):
    """Two micro-batches of 1.2 s a step where 2 s are left; what reads the lines, as `tee` does, ends with Ctrl-C.

    Mutations: without the look between micro-batches the step is finished; without `tell` the rank dies of the pipe.
    """
    (tmp_path / "slow.py").write_text(SLOW.format(recipe=str(tiny_recipe)))
    run = launch(tmp_path / "slow.py", "train.steps=300", "train.save_every=100", log_dir=tmp_path, pipe=True)
    run.wait_for("step 1/300")
    assert "warning: a step takes about" in run.text and "leaves its step at the next micro-batch" in run.text
    tree = psutil.Process(run.process.pid).children(recursive=True)
    time.sleep(1)
    os.killpg(run.process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(tree, timeout=240)
    assert not alive
    run.wait()
    err = (tmp_path / "stderr.txt").read_text()
    assert "the last finished step is saved after this micro-batch" in err and "the launcher leaves 2 s" in err, err
    done = len(metrics_of(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{done:06d}"]


@pytest.mark.parametrize("there", ["checkpoints/step-000002", "heads/heads.json", None])
def test_an_output_is_another_recipes_where_something_would_be_lost(there, tiny_recipe, tmp_path):
    recipe, out = Recipe.load(tiny_recipe), tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(Recipe.load(tiny_recipe, ["train.lr=1e-3", "heads.layers=2"]).to_yaml())
    if there:
        (out / there).mkdir(parents=True)
    with ExitStack() as stack:
        if there is None:
            _claim(out, recipe, stack)
            return
        with pytest.raises(
            UserError, match=r"train\.lr: this output was made with 0\.001; the recipe says 0\.01"
        ) as error:
            _claim(out, recipe, stack)
    assert "heads.layers: this output was made with 2; the recipe says 1" in str(error.value)
    assert ("to train these heads further, set heads.init_from=" in str(error.value)) == (there == "heads/heads.json")


def test_keys_that_changed_nothing_are_left_out_where_an_older_version_kept_them(tiny_recipe, tmp_path):
    """They are refused now, so that nobody could go on: with them the recipe, without them the output. Mutation:
    compare them as all others."""
    held_out = ["data.validation=sample"]
    recipe, out = Recipe.load(tiny_recipe, held_out), tmp_path / "out"
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    data, loss = {"validation_max": 9}, {"coefficient_warmup_ratio": 0.5}
    update = {"data": recipe.data.model_copy(update=data), "loss": recipe.loss.model_copy(update=loss)}
    (out / "recipe.yaml").write_text(recipe.model_copy(update=update).to_yaml())
    with ExitStack() as stack:
        _claim(out, recipe, stack)
    other = Recipe.load(tiny_recipe, [*held_out, "train.lr=0.5"])
    with ExitStack() as stack, pytest.raises(UserError, match=r"train\.lr: this output was made with") as error:
        _claim(out, other, stack)
    assert "validation_max" not in str(error.value)


def test_names_for_weights_and_biases_may_change_and_reach_deepspeed(tiny_recipe):
    recipe = Recipe.load(tiny_recipe, ["train.wandb={project: medusa, group: smol, name: first}"])
    config = recipe.ds_config(1, on_gpu=False)
    assert config["wandb"] == {"enabled": True, "project": "medusa", "group": "smol"}
    assert _is_free("train.wandb.name") and not _is_free("train.warmup_ratio")


@pytest.mark.parametrize("monitor", ["wandb", "tensorboard"])
def test_a_monitor_that_is_not_installed_is_a_line_before_anything_loads(monitor, tiny_recipe, tmp_path, monkeypatch):
    """Mutation: leave it to DeepSpeed, which imports it when the model is there."""
    recipe = Recipe.load(tiny_recipe, [f"train.{monitor}=true"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"^train.{monitor}: found it, but {monitor} is not installed; pip install"):
        _run(recipe, tiny_recipe, Ranks(), tmp_path / "out", None)


def test_a_batch_that_ranks_do_not_divide_is_refused_before_anything_loads(tiny_recipe, tmp_path):
    ranks = Ranks()
    ranks.size = 3
    with pytest.raises(UserError, match=r"^train.global_batch_size: found 4, which 3 ranks x"):
        _run(Recipe.load(tiny_recipe), tiny_recipe, ranks, tmp_path / "out", None)


def test_shipped_heads_of_a_model_are_named_at_the_end_of_a_first_run():
    assert "medusa-ds generate smollm2_135m" in _shipped(Recipe.load("smollm2_135m_stage1"))
    assert _shipped(Recipe.load("llama3_8b_stage1")) == ""


def test_a_port_in_use_is_no_matter_to_one_rank_and_a_line_to_several(tiny_recipe, tmp_path):
    """Mutation: leave the launcher's port to one rank."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = {"MASTER_PORT": str(other.getsockname()[1])}
        train(tiny_recipe, "train.steps=1", env=taken, log_dir=tmp_path)
        two = f"output={tmp_path / 'two'}"
        text = train(tiny_recipe, two, ranks=2, env=taken, ends=(2, 1), log_dir=tmp_path)
    assert f"error: port {taken['MASTER_PORT']}: in use, as by another training" in text and "Traceback" not in text


def test_two_nodes_of_a_hostfile_train_as_one_does(tiny_recipe, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    train(tiny_recipe, f"output={tmp_path / 'one'}", log_dir=tmp_path)
    port = free_port()
    nodes = [
        launch(
            tiny_recipe,
            f"output={tmp_path / 'two'}",
            port=port,
            log_dir=tmp_path,
            options=("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1"),
        )
        for node in (0, 1)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_slurm_tasks_learn_who_they_are_and_where_the_first_one_is(tiny_recipe, tmp_path, monkeypatch):
    """As `deepspeed --launcher slurm` starts them: srun runs the recipe itself, with SLURM's variables only."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames node[1-2]' ] && echo first && echo other\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": "54321"}
    slurm["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen: list[list[str]] = []
    monkeypatch.setattr("medusa_ds.programs.train.run", lambda _: seen.append([os.environ[name] for name in names]))
    monkeypatch.setattr(sys, "argv", [str(tiny_recipe), "train.steps=2"])
    for rank in "01":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**dict.fromkeys(names, ""), **slurm, "SLURM_PROCID": rank}.items():
                patch.setenv(name, value)
            patch.delenv("MASTER_PORT")
            main(str(tiny_recipe))
    assert seen == [[rank, "0", "2", "first", "34321"] for rank in "01"]


AT_THE_END = """import resource
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast as Tokenizer
from medusa_ds import page
from medusa_ds.train import main

def save(self, *arguments, of=Tokenizer.save_pretrained, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return of(self, *arguments, **options)

Tokenizer.save_pretrained = save
page.write_page = lambda *_: print("the ranks are still", "together" if dist.is_initialized() else "apart")
main()
"""


@pytest.mark.parametrize("full", [False, True])
def test_the_end_of_a_run(full, tiny_recipe, tmp_path):
    """Mutations: write the page when other ranks have left, who then count as dead; `storage` without
    `system_errors`."""
    (tmp_path / "end.py").write_text(AT_THE_END.format(limit=6000 if full else 1 << 30))
    text = train(tmp_path / "end.py", str(tiny_recipe), log_dir=tmp_path, ends=(2,) if full else (0,))
    assert "Traceback" not in text
    if full:
        assert f"error: {tmp_path / 'out'}: cannot be written (File too large); make room" in text
    else:
        assert "the ranks are still together" in text
