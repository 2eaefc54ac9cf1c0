"""Training from a hidden cache: a tiny model, kills, a full disk."""

import json
import shutil
import signal

import pytest
from support import cli, fault, losses_of, metrics_of, train

from medusa_ds.cli import main

STEPS = ("train.steps=40", "train.save_every=10", "heads.vocab=128")  # three epochs


def test_kills_while_filling_and_while_reading_change_no_loss(tiny_recipe, tmp_path):
    """Two ranks are killed while they fill, then while they read; one rank of ZeRO-3 ends the run. Losses and figures
    are those without a cache. Mutation: read the rows of the next conversation (`numbers + base + 1`)."""
    plain, out, cache = tmp_path / "plain", tmp_path / "out", tmp_path / "hidden"
    train(tiny_recipe, f"output={plain}", *STEPS, log_dir=tmp_path)
    command = (tiny_recipe, f"data.hidden_cache={cache}", *STEPS)
    killed = {"ranks": 2, "ends": (1, -signal.SIGKILL), "log_dir": tmp_path}
    text = train(*command, env=fault(cache, 1, "kill", 3, r"\.tmp-shard-.*tensors$"), **killed)
    assert "fault: kill" in text
    done = len(list(cache.glob("shard-*.json")))
    assert 0 < done < 16
    text = train(*command, env=fault(out, 1, "kill", 2, "step-000020"), **killed)
    assert "fault: kill" in text and f"filling {16 - done} of 16 shards" in text
    text = train(*command, "deepspeed=ds_configs/zero3.json", log_dir=tmp_path)
    assert "resuming after step 10 of 40" in text and f"hidden cache: {cache}" in text and "complete" in text
    assert losses_of(out) == pytest.approx(losses_of(plain), rel=2e-6)
    last = [metrics_of(folder, "validation")[-1] | {"kind": 0} for folder in (out, plain)]
    assert last[0] == pytest.approx(last[1], rel=2e-6)
    exported = tmp_path / "exported"
    main(["export", str(out / "checkpoints" / "best"), str(exported), "--for", "transformers"])
    assert json.loads((exported / "heads" / "heads.json").read_text())["vocab_size"] == 300


def test_a_full_disk_is_one_line_and_prepare_fills_on_two_ranks(tiny_recipe, tmp_path):
    cache = tmp_path / "hidden"
    command = (tiny_recipe, f"data.hidden_cache={cache}", "train.steps=2", "heads.lm_head=shared")
    full = fault(cache, 1, "ENOSPC", 3, r"\.tmp-shard-.*tensors$")
    text = train(*command, ranks=2, env=full, ends=(2, 1), log_dir=tmp_path)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert f"{cache}: the hidden cache cannot be written (No space left on device)" in errors[0]
    shutil.rmtree(cache)
    text = cli("prepare", *command, "--hidden", ranks=2, log_dir=tmp_path)
    assert "filling 16 of 16 shards" in text
    text = train(*command, "deepspeed=ds_configs/zero3.json", ranks=2, log_dir=tmp_path)
    assert "complete" in text and "heads saved in" in text
    train(tiny_recipe, "train.steps=2", "heads.lm_head=shared", f"output={tmp_path / 'plain'}", log_dir=tmp_path)
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "plain"), rel=2e-6)
