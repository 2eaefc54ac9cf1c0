"""Mistakes of an impatient user: a line with status 2 before a model loads, and nothing lost."""

import json
import shutil

import pytest

from medusa_ds import runs
from medusa_ds.cli import main
from medusa_ds.model import backbone
from medusa_ds.programs import distill, export

ASKED = ["--prompts", "q.jsonl", "--max-new-tokens", "8"]


@pytest.fixture
def place(place):
    (place / "dir").mkdir()
    (place / "dir" / "kept").write_text("kept")
    (place / "afile").write_text("a line without an end")
    (place / "q.jsonl").write_text('{"turns": ["hi"]}\n')
    (place / "empty.jsonl").touch()
    return place


@pytest.fixture
def refused(place, monkeypatch, refused):
    """No model may load."""
    for module in (backbone, runs, distill, export):
        monkeypatch.setattr(module, "load_backbone", lambda *_, **__: pytest.fail("a model loads"))
    return refused


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--json", "afile/x.json"], "--json: afile/x.json: cannot be written"),
        (["--json", "dir"], "is a directory"),
        (["--picture", "afile/x.svg"], "afile is no directory"),
        (["--picture", "x.doc"], "name a .png, .svg or .pdf file"),
        (["--device", "gpu"], "--device: found 'gpu'; allowed is cpu"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "tree"])
def test_what_a_measurement_could_not_leave_is_refused_first(command, options, fragment, make_run, refused, place):
    """Mutation: look at the places when the work is done."""
    assert fragment in refused(command, make_run(), *ASKED, *options)
    assert (place / "dir" / "kept").read_text() == "kept"


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_an_option_that_the_rule_of_acceptance_does_not_read_is_refused_first(command, make_run, refused):
    """Fails where `--temperature` beside greedy acceptance gives a greedy text in silence."""
    run, asked = make_run(), ASKED if command == "evaluate" else ("--prompt", "hi")
    assert "--temperature: found it with --acceptance greedy" in refused(command, run, *asked, "--temperature", "0.7")
    assert "--delta: found it" in refused(command, run, *asked, "--acceptance", "exact", "--delta", "0.2")


@pytest.mark.parametrize(
    ("command", "option", "needed"),
    [("evaluate", ("--in-flight", "4"), "server"), ("distill", ("--synthesize-temperature", "2"), "synthesize")],
)
def test_an_option_without_the_one_beside_which_it_is_read_is_refused(command, option, needed, tiny_recipe, refused):
    """Fails where it is taken and changes nothing."""
    error = refused(command, tiny_recipe, *ASKED, *option, *["--out", "o"] * (command == "distill"))
    assert f"{option[0]}: found it without --{needed}, beside which it is read" in error


def test_a_place_that_cannot_be_made_is_refused_first(make_run, tiny_model, tiny_recipe, refused):
    run = make_run()
    assert "afile is no directory" in refused("export", run, "afile/x")
    assert "afile is no directory" in refused("import", run, "afile/x")
    assert "afile is no directory" in refused("init", tiny_model, "--out", "afile/x.yaml")
    assert "afile/x" in refused("distill", tiny_recipe, *ASKED, "--out", "afile/x")
    assert "output" in refused("validate", tiny_recipe, "output=afile/x")


@pytest.mark.parametrize("argv", ["evaluate RUN -q --json NEW", "export RUN NEW", "init MODEL --out NEW.yaml"])
def test_directories_that_a_report_or_recipe_lacks_are_made(argv, make_run, tiny_model, place):
    """Mutation: write into a directory that nobody made."""
    names = {"RUN": str(make_run()), "-q": " ".join(ASKED), "MODEL": str(tiny_model), "NEW": "a/b/file"}
    for name, text in names.items():
        argv = argv.replace(name, text)
    main(argv.split())
    assert [file.stat().st_size > 0 for file in (place / "a" / "b").iterdir()] == [True]


def test_a_directory_that_only_others_may_write_is_refused_first(make_run, tiny_model, refused, place, monkeypatch):
    """Root may write everywhere, so it is the system's answer that is another one."""
    run = make_run()
    monkeypatch.setattr("medusa_ds.files.os.access", lambda *_: False)
    for argv in (
        ["export", run, "new"],
        ["import", run, "new"],
        ["init", tiny_model, "--out", "new"],
        ["list", "--copy", "smollm2_135m_stage1"],
        ["evaluate", run, *ASKED, "--json", "new"],
        ["tree", run, *ASKED],
    ):
        assert "is not writable); name another place" in refused(*argv)
    assert not (place / "new").exists()


@pytest.mark.parametrize("there", ["a line without an end", '{"turns": ["hi"]}', '{"turns": ["hi"]}\n', "one\ntwo"])
def test_distill_takes_no_file_for_its_own(there, tiny_recipe, refused, place):
    """Mutation: cut off any last line without an end."""
    (place / "mine").write_text(there)
    assert "mine" in refused("distill", tiny_recipe, *ASKED, "--out", "mine")
    assert (place / "mine").read_text() == there


def test_no_prompt_and_no_device_are_told_before_rows_are_begun(tiny_recipe, refused, place):
    asked = ["distill", tiny_recipe, "--out", "o.jsonl", "--max-new-tokens", "8"]
    assert "empty.jsonl: found no prompt" in refused(*asked, "--prompts", "empty.jsonl")
    assert "--device: found 'tpu'" in refused(*asked, "--prompts", "q.jsonl", "--device", "tpu")
    assert not (place / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("metrics", "launches"),
    [
        ("", None),
        ("garbage\n", "{}\n"),
        ("[1]\n", "{}\n"),
        ('{"kind": "train", "step": 1, "head1_loss": 2.0}\n', "{}\n"),
    ],
)
def test_a_page_of_no_run_or_of_another_versions_is_a_line(metrics, launches, refused, place):
    """Mutation: catch `OSError` alone."""
    (place / "dir" / "metrics.jsonl").write_text(metrics)
    if launches:
        (place / "dir" / "launches.jsonl").write_text(launches)
    assert "dir: metrics.jsonl" in refused("report", "dir")
    assert not (place / "dir" / "report.html").exists()


@pytest.mark.parametrize("evaluation", ["[1]", "", "{"])
def test_an_evaluation_that_is_none_is_a_line(evaluation, refused, place):
    (place / "dir" / "metrics.jsonl").touch()
    (place / "e.json").write_text(evaluation)
    assert "e.json" in refused("report", "dir", "--evaluation", "e.json")


@pytest.mark.parametrize(
    ("files", "fragment"),
    [
        ({"config.json": "[]"}, "found list; allowed is a JSON object"),
        ({"config.json": "{}"}, "give --base-model"),
        ({"config.json": '{"medusa_num_heads": "two"}'}, "medusa_num_heads: found 'two'"),
        (
            {"config.json": '{"base_model_name_or_path": "x/y"}', "model.safetensors.index.json": '{"weight_map": 3}'},
            "weight_map: found 3",
        ),
        ({"config.json": '{"base_model_name_or_path": "x/y"}', "model.safetensors": ""}, "cannot be read"),
        (None, "found no such directory"),
    ],
)
def test_what_holds_no_published_heads_is_a_line(files, fragment, refused, place):
    if files is not None:
        (place / "published").mkdir()
    for name, text in (files or {}).items():
        (place / "published" / name).write_text(text)
    assert fragment in refused("import", "published", "new")
    assert not (place / "new").exists()


def test_an_export_that_is_not_whole_is_not_served(refused, place):
    (place / "ex").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (place / "ex" / name).write_text("{}")
    assert "names no medusa_num_heads" in refused("serve", "ex", "--dry-run")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("format_version", 99, "found format_version 99; this version reads 1"),
        ("tree", "x", "a tree is a list of paths"),
        ("num", "three", "num: found 'three'"),
    ],
)
def test_a_run_of_another_version_is_told_before_its_model_loads(key, value, fragment, make_run, refused):
    file = make_run() / "heads" / "heads.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert fragment in refused("generate", file.parents[1], "--prompt", "x")


def test_a_base_model_is_not_taken_for_heads_that_have_a_tuned_one(make_run, tiny_model, refused):
    tuned = make_run("tuned", "stage=2", f"heads.init_from={make_run()}")
    again = refused("generate", tuned, "--prompt", "x", "--base-model", tiny_model)
    assert "--base-model: found it, but" in again and "has its own, tuned in stage 2" in again


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--prompt", "\udcff"], "prompt: found bytes that are no UTF-8; write it in UTF-8"),
        (
            ["--prompt", "hi", "--seed", "99999999999999999999"],
            "--seed: found '99999999999999999999'; allowed is a whole",
        ),
    ],
)
def test_what_generate_could_not_read_or_draw_by_is_a_line(options, fragment, make_run, refused):
    assert fragment in refused("generate", make_run(), *options)


def test_keys_that_nobody_has_are_told(refused):
    assert "--keys: found no key that holds 'zzz'" in refused("show", "--keys", "zzz")


def test_names_with_spaces_signs_and_letters_of_all_kinds_work(tiny_model, conversations, place, capsys):
    """Mutation: write `output` without quotes."""
    folder = place / "mit Leerzeichen ü"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "modell é")
    shutil.copy(conversations, folder / "chät 1.jsonl")
    monkey = ["--data", "mit Leerzeichen ü/../mit Leerzeichen ü/chät 1.jsonl", "--out", "mit: #1 ü.yaml"]
    main(["init", "mit Leerzeichen ü/modell é", *monkey])
    text = (place / "mit: #1 ü.yaml").read_text()
    assert f'"{folder}/chät 1.jsonl"' in text and f'"{folder}/modell é"' in text
    main(["validate", "mit: #1 ü.yaml", "--world-size", "8"])
    assert capsys.readouterr().out.endswith("ok\n")
