"""Exported and published heads, read back."""

import json
import os
import pickle
from typing import Any

import pytest
import torch
from exporting import assert_same, export_
from safetensors.torch import save_file
from support import files_of_at_most

from medusa_ds.cli import main
from medusa_ds.errors import UserError
from medusa_ds.heads.files import load_heads
from medusa_ds.programs import import_heads
from medusa_ds.runs import load_run


@pytest.mark.parametrize("engine", ["vllm", "tgi", "fasterdecoding", "all"])
@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_export_import_export_gives_identical_tensors(make_run, engine, lm_head):
    """Turns red when the import counts heads from the config, or drops a head's last block."""
    run = make_run("run", f"heads.lm_head={lm_head}", "heads.num=2", "heads.layers=1", dtype=torch.bfloat16)
    first = export_(run, "first", "--for", engine)
    if lm_head == "shared" and engine == "fasterdecoding":  # there every head has a copy: it comes back as its own
        return
    main(["import", str(first), str(run.parent / "back")])
    assert_same(first, export_(run.parent / "back", "second", "--for", engine))
    assert load_run(run.parent / "back", torch.device("cpu"), torch.bfloat16).tokenizer.chat_template


def test_published_heads_are_imported_without_biases_and_with_a_wrong_config(tiny_model, tmp_path, refused):
    draw = torch.Generator().manual_seed(0)
    old = {f"medusa_head.{h}.0.linear.weight": torch.randn(32, 32, generator=draw) for h in range(5)}
    old |= {f"medusa_head.{h}.1.weight": torch.randn(300, 32, generator=draw) for h in range(5)}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "medusa_lm_head.pt")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    assert "give --base-model" in refused("import", tmp_path / "old", tmp_path / "new")
    main(["import", str(tmp_path / "old"), str(tmp_path / "new"), "--base-model", str(tiny_model)])
    config, heads = load_heads(tmp_path / "new")
    assert (config["num"], config["layers"]) == (5, 1)
    assert heads["4.projection.weight"].equal(old["medusa_head.4.1.weight"])
    assert not heads["0.blocks.0.bias"].any()
    assert (
        load_run(tmp_path / "new", torch.device("cpu"), torch.float32)
        .heads[4]
        .blocks[0]
        .weight.equal(old["medusa_head.4.0.linear.weight"])
    )
    torch.save({name: old[name] for name in old if "linear" in name}, tmp_path / "old" / "medusa_lm_head.pt")
    error = refused("import", tmp_path / "old", tmp_path / "other", "--base-model", tiny_model)
    assert "no projection tells the size of the vocabulary; write vocab_size into config.json" in error


def test_a_full_disk_leaves_nothing_and_is_one_line(make_run, tmp_path, refused):
    """Mutation: leave it to what says so of any file, which knows no other place."""
    exported = export_(make_run(), "exported", "--for", "vllm")
    with files_of_at_most(9000):
        error = refused("import", exported, tmp_path / "back")
    assert error == f"error: {tmp_path / 'back'}: cannot be written (File too large); name a writable directory\n"
    assert not (tmp_path / "back").exists()


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["HOSTILE"],))


def test_hostile_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    """Turns red when the pickle is read with `weights_only=False`."""
    monkeypatch.setenv("HOSTILE", str(tmp_path / "done"))
    (tmp_path / "config.json").write_text(json.dumps({"base_model_name_or_path": "owner/model", "vocab_size": 300}))
    file = tmp_path / "medusa_lm_head.pt"

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            import_heads.run(import_heads.Settings(directory=str(tmp_path), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "holds no heads" in refusal()
    file.write_bytes(pickle.dumps(Hostile()))
    assert "cannot be read" in refusal() and not (tmp_path / "done").exists()
    good = {"0.0.linear.weight": torch.zeros(4, 4), "0.1.weight": torch.zeros(9, 4), "1.1.weight": torch.zeros(9, 4)}
    torch.save(good, file)
    assert "1.blocks.0.weight is None, not (4, 4)" in refusal()
    for token_map, found in (
        (torch.zeros(3), "different tokens below 9"),
        ([1, 2], "token_map: found list; heads are"),
    ):
        torch.save({"token_map": token_map, **good, "1.0.linear.weight": torch.zeros(4, 4)}, file)
        assert found in refusal()
    few = {"token_map": torch.tensor([1, 8]), **good, "1.0.linear.weight": torch.zeros(4, 4)}
    torch.save(few | {"1.1.weight": torch.zeros(7, 4)}, file)
    assert "1.projection.weight is (7, 4), not (9, 4)" in refusal()
    torch.save({**good, "0.0.linear.bias": torch.zeros(5)}, file)
    assert "0.blocks.0.bias is (5,), not (4,)" in refusal()
    torch.save([torch.zeros(4, 4)], file)
    assert f"{file}: cannot be read" in refusal()
    for wrong, found in (
        (torch.zeros(4, 4).char(), "[4, 4] of torch.int8"),
        (torch.tensor(1.0), "[] of torch.float32"),
        (3, "int"),
    ):
        torch.save({"0.0.linear.weight": wrong}, file)
        assert f"0.0.linear.weight: found {found}; heads are vectors and matrices of floating-point" in refusal()
    torch.save({"64.0.linear.weight": torch.zeros(4, 4)}, file)
    assert "found 65 heads of 1 block; allowed are at most 64 of each" in refusal()
    torch.save({3: torch.zeros(4)}, file)
    assert "found 3; not heads" in refusal()
    says = {"base_model_name_or_path": "owner/model", "hidden_size": 576, "medusa_num_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(says))
    torch.save({"0.0.weight": torch.zeros(2, 2)}, file)
    assert "found 1 head of hidden size 2; config.json says 3 of 576" in refusal()
    save_file({"model.embed_tokens.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight; not heads" in refusal()
