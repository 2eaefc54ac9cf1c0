"""Hydra heads through all programs: trained with and without a hidden cache, measured, decoded, exported."""

import json

import pytest
from support import losses_of, train

from medusa_ds.cli import main

HYDRA = ("heads.kind=hydra", "heads.layers=2", "heads.lm_head=shared")


def test_a_run_from_recipe_to_text(tiny_recipe, tmp_path, refused):
    """Mutations: embeddings of the cached backbone other than its own; a kind that `heads.json` does not name."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    train(tiny_recipe, *HYDRA, f"output={plain}", log_dir=tmp_path)
    cached = (f"data.hidden_cache={tmp_path / 'hidden'}", "deepspeed=ds_configs/zero3.json")
    train(tiny_recipe, *HYDRA, *cached, ranks=2, log_dir=tmp_path)
    assert losses_of(out) == pytest.approx(losses_of(plain), rel=2e-6)
    assert json.loads((out / "heads" / "heads.json").read_text())["kind"] == "hydra"

    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text("".join(json.dumps({"turns": [f"from {word}"]}) + "\n" for word in ("red", "one", "two", "sun")))
    main(["tree", str(out), "--prompts", str(prompts), "--max-new-tokens", "24", "--nodes", "8"])
    for run in (out, out / "checkpoints" / "best"):
        main(["evaluate", str(run), "--prompts", str(prompts), "--max-new-tokens", "24", "--json", str(report)])
        found = json.loads(report.read_text())
        assert found["texts"]["differ"] == found["texts"]["differ_by_a_tie"]
    err = refused("export", out, tmp_path / "exported", "--for", "tgi")
    assert "--for tgi: found heads.kind hydra, which it does not run" in err
    main(["export", str(out), str(tmp_path / "exported"), "--for", "all"])
    assert not list((tmp_path / "exported").glob("medusa_lm_head*"))
    assert json.loads((tmp_path / "exported" / "heads" / "heads.json").read_text())["kind"] == "hydra"
    err = refused("import", tmp_path / "exported", tmp_path / "back")
    assert "exported: found hydra heads, and only Medusa heads are imported" in err and not (tmp_path / "back").exists()
