"""`medusa-ds generate`, `evaluate` and `tree` on a tiny run: finished, as a heads folder and as a checkpoint."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support import heads_meta, tiny_tokenizer
from transformers import AutoModelForCausalLM

from medusa_ds import runs
from medusa_ds.cli import main
from medusa_ds.data.prompts import Prompt, read_prompts
from medusa_ds.decoding.decoder import end_tokens
from medusa_ds.errors import UserError
from medusa_ds.heads.files import META, load_heads, save_heads
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.programs import evaluate, tree
from medusa_ds.runs import encode, load_run
from medusa_ds.training import checkpoint
from medusa_ds.training.state import KEYS

pytestmark = pytest.mark.usefixtures("steady_clock")

NUM, VOCAB, HIDDEN = 2, 300, 32
RECIPE = "model: {model}\nheads: {heads}\nstage: {stage}\ndata: {{template_args: {{}}}}\n"


def _save_checkpoint(output, named_tensors, step):
    tensors = [
        (f"{name}/{key}", tensor if key == KEYS[0] else tensor + 1) for name, tensor in named_tensors for key in KEYS
    ]
    checkpoint.save(output / "checkpoints", step, iter(tensors), {"engine": {}}, 1)
    checkpoint.keep(output / "checkpoints", step, step)


@pytest.fixture
def output(tiny_model, tmp_path):
    """A finished stage-1 run of a model that is sure of itself, with heads that are right now and then."""
    shutil.copytree(tiny_model, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    heads = MedusaHeads(NUM, 1, HIDDEN, VOCAB)
    heads.initialize(model.lm_head.weight)
    spec = {"num": NUM, "layers": 1, "lm_head": "own"}
    recipe = RECIPE.format(model=json.dumps({"name": str(tmp_path / "model")}), heads=json.dumps(spec), stage=1)
    meta = heads_meta(NUM, 1, HIDDEN, VOCAB, recipe=recipe)
    save_heads(tmp_path / "run" / "heads", heads.state_dict(), meta)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    _save_checkpoint(tmp_path / "run", [(f"heads.{name}", t) for name, t in heads.named_parameters()], 40)
    return tmp_path / "run"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["Hi", "And?"], "category": "talk"}, {"turns": ["12+3"], "category": "maths"}, {"turns": ["ok"]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def _evaluate(run, prompts, program=evaluate, **more):
    settings = {"max_new_tokens": 24, "device": "cpu", **more}
    return program.run(program.Settings(run=str(run), prompts=str(prompts), **settings))


_search_tree = partial(_evaluate, program=tree)


def test_run_heads_folder_and_checkpoint_give_the_same_figures_which_agree_with_each_other(output, prompts, capsys):
    """Mutation: read an Adam moment in place of the master weights."""
    places = (output, output / "heads", output / "checkpoints" / "best")
    reports = [_evaluate(run, prompts) for run in places]
    for report in reports:
        report.pop("run")
        speed = report.pop("speed")
        assert speed["speed_up_decoding"] > 0 < speed["speed_up_end_to_end"]
        assert speed["most_that_a_step_allows"] == pytest.approx(
            report["accepted"]["mean_tokens_per_step"] / speed["step_overhead"], rel=0.1
        )
    assert reports[0] == reports[1] == reports[2]
    report = reports[0]
    assert report["texts"] == {"compared": 4, "differ": 0, "differ_by_a_tie": 0, "differences": []}
    assert set(report["accepted"]["by_category"]) == {"talk", "maths", ""}
    assert 1 <= report["accepted"]["mean_tokens_per_step"] <= NUM + 1
    assert "tokens per step, decoding" in capsys.readouterr().out
    heads, accepted = report["heads"], report["accepted"]
    for k in (1, 2):
        shares = list(heads[f"head{k}"].values())
        assert shares == sorted(shares)
    assert heads["full_acc_1"] == heads["cond_acc_1"] == heads["head1"]["top1"]
    assert heads["full_acc_2"] == pytest.approx(heads["full_acc_1"] * heads["cond_acc_2"])
    assert heads["chain_acceptance_teacher_forced"] == pytest.approx(1 + heads["full_acc_1"] + heads["full_acc_2"])
    total = sum(int(count) * steps for count, steps in accepted["distribution"].items())
    assert accepted["mean_tokens_per_step"] == pytest.approx(total / accepted["steps"])


def test_tree_is_written_into_the_run_and_used_from_then_on(output, prompts, tmp_path, capsys):
    files = {"json_file": str(tmp_path / "tree.json"), "picture": str(tmp_path / "tree.png")}
    found = _search_tree(output, prompts, nodes=8, **files)
    kept = json.loads((output / "heads" / "heads.json").read_text())
    assert found["chosen"] == 8 == len(kept["tree"]) + 1
    assert json.loads((tmp_path / "tree.json").read_text())["chosen"] == 8
    report = _evaluate(output, prompts, picture=str(tmp_path / "heads.svg"))
    assert report["tree"] == {"nodes": 8, "depth": 2, "measured": True}
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("tree.png", "heads.svg"))
    assert sorted(file.name for file in (output / "heads").iterdir()) == ["heads.json", "heads.safetensors"]
    rows = found["sizes"]
    assert [row["nodes"] for row in rows][:4] == [1, 2, 4, 8]
    assert [row["expected"] for row in rows] == sorted(row["expected"] for row in rows)
    assert rows[0]["expected"] == rows[0]["held_out"] == 1
    assert "tokens/step" in capsys.readouterr().out


def test_tree_says_when_fewer_nodes_are_faster(output, prompts, capsys, monkeypatch):
    monkeypatch.setattr(tree, "step_ms", lambda decoder, context: float(decoder.tree.nodes) ** 2)
    _search_tree(output, prompts, nodes=8)
    assert "note: 1 nodes are " in capsys.readouterr().out
    assert _search_tree(output, prompts)["chosen"] == 1
    assert "note: " not in capsys.readouterr().out


def test_a_tree_is_no_wider_than_the_heads_vocabulary(output, prompts):
    """Neither a found one nor the one that an export had before its heads were cut. Mutation: leave `load_run`'s."""
    config, _ = load_heads(output)
    heads = MedusaHeads(NUM, 1, HIDDEN, VOCAB, token_map=torch.tensor([97, 98, 99]))
    save_heads(output / "heads", heads.state_dict(), {key: config[key] for key in META})
    runs.save_tree(output / "heads" / "heads.json", [(0,), (4,), (0, 2), (0, 3), (4, 0)])
    run = load_run(output, torch.device("cpu"), torch.float32)
    assert run.tree.paths == [(0,), (0, 2)]
    found = _search_tree(output, prompts, nodes=64)
    assert max(row["nodes"] for row in found["sizes"]) == 1 + 3 + 9


def test_answers_of_one_token_are_evaluated(output, prompts, capsys):
    report = _evaluate(output, prompts, json_file=str(output / "evaluation.json"), max_new_tokens=1)
    written = (output / "evaluation.json").read_text()
    assert "NaN" not in written and json.loads(written)["speed"]["speed_up_decoding"] is None
    assert report["accepted"]["steps"] == 0 and report["speed"]["medusa_step_ms"] > 0
    assert "decoding alone" in capsys.readouterr().out


def test_transformers_own_rate_is_that_of_greedy_decoding(output, prompts, monkeypatch):
    """Whatever the model's generation_config.json asks for. Mutation: leave the beams to it."""
    (output.parent / "model" / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 2}')
    monkeypatch.setattr("transformers.GenerationMixin._beam_search", lambda *_, **__: pytest.fail("beams"))
    assert _evaluate(output, prompts, max_new_tokens=2)["speed"]["transformers_generate_tokens_per_s"]


def test_ends_that_are_no_tokens_are_a_users_mistake(output, refused):
    (output.parent / "model" / "generation_config.json").write_text('{"eos_token_id": [[1]]}')
    err = refused("generate", output, "--prompt", "Hi", "--device", "cpu")
    assert "generation_config.json: eos_token_id: found [[1]]; allowed is" in err


def test_tree_refuses_a_checkpoint(output, prompts):
    with pytest.raises(UserError, match="sealed"):
        _search_tree(output / "checkpoints" / "best", prompts)


@pytest.mark.parametrize("name", ["rank00000-00000.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(
    name, output, prompts, tmp_path, refused, monkeypatch
):
    """Mutation: `runs._open_checkpoint` without `check`, and one bit decides on the figures."""
    file = output / "checkpoints" / "step-000040" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("medusa_ds.runs.load_backbone", None)
    best = output / "checkpoints" / "best"
    for command in (
        ["evaluate", best, "--prompts", prompts],
        ["generate", best, "--prompt", "Hi"],
        ["export", best, tmp_path / "exported"],
    ):
        error = refused(*command)
        assert error.startswith(f"error: {file}: ") and error.endswith("name another checkpoint\n"), error
    assert not (tmp_path / "exported").exists()


def test_stage_two_takes_the_tuned_backbone(output):
    """Mutation: load the base model whatever the stage."""
    tuned = AutoModelForCausalLM.from_pretrained(output.parent / "model")
    torch.manual_seed(7)
    for parameter in tuned.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    config = json.loads((output / "heads" / "heads.json").read_text())
    config["recipe"] = config["recipe"].replace("stage: 1", "stage: 2")
    (output / "heads" / "heads.json").write_text(json.dumps(config))
    (output / "recipe.yaml").write_text(config["recipe"])
    with pytest.raises(UserError, match=r"backbone: missing"):
        load_run(output, torch.device("cpu"), torch.float32)
    tuned.save_pretrained(output / "backbone")
    shutil.copytree(output.parent / "model", output / "heads", dirs_exist_ok=True, ignore=lambda *_: {"config.json"})
    weights = load_file(output / "heads" / "heads.safetensors")
    heads = [(f"heads.{name}", tensor) for name, tensor in weights.items()]
    named = [(f"backbone.{name}", tensor.detach()) for name, tensor in tuned.named_parameters()]
    _save_checkpoint(output, named + heads, 41)
    for place in (output, output / "checkpoints" / "best"):
        run = load_run(place, torch.device("cpu"), torch.float32)
        assert all(tensor.equal(tuned.state_dict()[name]) for name, tensor in run.backbone.state_dict().items())
        assert all(tensor.equal(weights[name]) for name, tensor in run.heads.state_dict().items())


def test_every_bad_row_of_prompts_is_left_out_and_named(tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    lines = [
        '{"turns": ["a"], "category": null}',
        "{",
        "[]",
        '{"turns": []}',
        '{"turns": ["a", 3]}',
        '{"turns": ["a"], "category": 1}',
    ]
    lines.append('{"turns": ["a", " "]}')
    file.write_text("\n".join(lines))
    assert read_prompts("--prompts", str(file)) == [Prompt([{"role": "user", "content": "a"}], "")]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said[:-1]] == [f"{file}:{n}" for n in range(2, 8)]
    assert said[-1] == "6 of 7 prompts were left out"
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(UserError) as caught:
        read_prompts("--prompts", str(file))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:{n}" for n in range(1, 7)]
    file.write_text("\n".join([lines[0]] * 2))
    assert read_prompts("--prompts", str(file), 1) == [Prompt([{"role": "user", "content": "a"}], "")]
    file.write_text("\n")
    with pytest.raises(UserError, match="found no prompt"):
        read_prompts("--prompts", str(file))
    with pytest.raises(UserError, match=r"--prompts: .*none.jsonl: found no such file"):
        read_prompts("--prompts", str(tmp_path / "none.jsonl"))


def test_a_rows_system_prompt_stands_before_its_turns_and_what_answers_would_lack_is_left_out(tmp_path, capsys):
    """Fails where `turns` replace the whole row, or where schemas and arguments of the template are dropped."""
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"turns": ["a"], "system": "be brief"},
        {"turns": ["b"], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    rows.append({"messages": [{"role": "user", "content": "c"}], "tools": [{"type": "function"}]})
    file.write_text("\n".join(map(json.dumps, rows)))
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    assert read_prompts("--prompts", str(file)) == [Prompt(said, "")]
    assert capsys.readouterr().err.count("schemas of functions or chat_template_kwargs") == 2


def test_prompts_may_be_conversations_whose_answers_are_made_anew(output, tmp_path):
    """What `distill` writes, and a system turn; what is over the model's limit is counted.

    Mutation: leave system turns out.
    """
    turns, system = ["hello", "more"], {"role": "system", "content": "be brief"}
    rows = {
        "turns": {"turns": turns},
        "messages": {
            "messages": [
                {"role": role, "content": text} for turn in turns for role, text in (("user", turn), ("assistant", "x"))
            ]
        },
    }
    rows["system"] = {"messages": [system, *rows["messages"]["messages"]]}
    for name, row in rows.items():
        long = json.dumps({"turns": ["x" * 500]}) + "\n" if name == "system" else ""
        (tmp_path / f"{name}.jsonl").write_text(long + json.dumps(row))
    plain, anew = (read_prompts("--prompts", str(tmp_path / f"{name}.jsonl")) for name in ("turns", "messages"))
    assert plain == anew
    reports = [_evaluate(output, tmp_path / f"{name}.jsonl") for name in ("turns", "system")]
    assert [tuple(report["prompts"].values())[1:] for report in reports] == [(2, 0), (2, 1)]
    assert reports[0]["heads"] != reports[1]["heads"]


def _greedy(output, turns, max_new_tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output.parent / "model"), tiny_tokenizer()
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=False)]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_streams_the_base_models_own_text(output, capsys):
    main(["generate", str(output), "--prompt", "Hi", "--max-new-tokens", "20", "--device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out == _greedy(output, ["Hi"], 20) + "\n"
    assert "20 tokens, " in printed.err
    assert "tokens per step" in printed.err


def test_a_prompt_over_the_limit_is_refused_before_the_model_is_loaded(output, refused, monkeypatch):
    """Mutation: leave it to the decoder."""
    monkeypatch.setattr(runs.Saved, "load_backbone", lambda *_: pytest.fail("loaded"))
    assert "; the model's limit is " in refused("generate", output, "--prompt", "x" * 500, "--device", "cpu")


def test_generate_names_the_run_whose_base_model_is_missing(output, refused):
    """Before it reads the prompt. Mutation: the base model's own error."""
    (output.parent / "model" / "config.json").unlink()
    for more in ([], ["--prompt", "Hi"]):
        assert "heads: its base model (--base-model names another place): model.name: " in refused(
            "generate", output, *more, "--device", "cpu"
        )


def test_a_base_model_that_has_moved_is_found_where_the_user_says(output, said):
    """Mutation: leave the option out of a checkpoint's way."""
    ask = ["--prompt", "Hi", "--max-new-tokens", "8", "--device", "cpu"]
    runs = [output, output / "checkpoints" / "best"]
    wanted = [said("generate", run, *ask) for run in runs]
    moved = (output.parent / "model").rename(output.parent / "moved")
    assert [said("generate", run, *ask, "--base-model", moved) for run in runs] == wanted


def test_a_chat_goes_on_where_a_conversation_has_grown_over_the_limit(output, capsys, monkeypatch):
    """It is kept, without the turn that did not fit. Mutation: leave the chat, or keep that turn."""
    lines = iter(["Hi", "", "x" * 300, "And?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["generate", str(output), "--max-new-tokens", "8", "--device", "cpu"])
    first = _greedy(output, ["Hi"], 8)
    said = capsys.readouterr()
    assert said.out == first + "\n" + _greedy(output, ["Hi", first, "And?"], 8) + "\n"
    assert said.err.count("; the model's limit is 256: shorten it, or begin anew with /clear\n") == 1


@pytest.mark.parametrize("rule", ["typical", "exact"])
def test_other_rules_evaluate_without_comparing_texts(output, prompts, said, rule):
    options = f"--max-new-tokens 12 --acceptance {rule} --temperature 0.8 --device cpu".split()
    assert "differ" not in said("evaluate", output, "--prompts", prompts, *options)


@pytest.mark.parametrize("place", ["heads", "checkpoints/best"])
def test_a_run_keeps_the_template_that_it_was_trained_with(output, prompts, place):
    """The recipe's own, and Vicuna's, whose tokenizer has none; its end ends answers. Mutation: the tokenizer's."""
    model = output.parent / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        _evaluate(output / place, prompts)
    end = "<|endoftext|>"
    own = f"{{% for m in messages %}}{{{{ m.role ~ '=' ~ m.content ~ '{end}' }}}}{{% endfor %}}"
    own += "{% if add_generation_prompt %}assistant={% endif %}"
    for name, args, text in (("model", {"chat_template": own}, f"user=Hi{end}assistant="), ("vicuna", {}, None)):
        recipe = {"model": {"name": str(output.parent / name)}, "stage": 1, "data": {"template_args": args}}
        recipe["heads"] = {"num": NUM, "layers": 1, "lm_head": "own"}
        if name == "vicuna":
            shutil.copytree(model, output.parent / name)
        (output / "recipe.yaml").write_text(json.dumps(recipe))
        config = json.loads((output / "heads" / "heads.json").read_text())
        config |= {"recipe": json.dumps(recipe), "base_model": name}
        (output / "heads" / "heads.json").write_text(json.dumps(config))
        run = load_run(output / place, torch.device("cpu"), torch.float32)
        said = run.tokenizer.decode(encode(run, [{"role": "user", "content": "Hi"}]))
        assert said == text if text else said.endswith("USER: Hi ASSISTANT:")
        assert run.tokenizer.decode(encode(run, [{"role": "user", "content": end}])).count(end) == 1 + bool(text)
        assert sorted(end_tokens(run.backbone)) == ([0, 2] if text else [2])
