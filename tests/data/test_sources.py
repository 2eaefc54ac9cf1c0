"""Sources: formats, what is rejected and where, the split, weights, the cache."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset_builder

from medusa_ds.config.recipe import DataSpec, SourceSpec
from medusa_ds.data import sources
from medusa_ds.data.layouts import LAYOUTS, UnusableRow
from medusa_ds.data.sources import Conversations, load_conversations
from medusa_ds.errors import UserError


def row(question: str = "Hi", answer: str = "Yes") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def load(path, **spec) -> Conversations:
    path = path if isinstance(path, list) else str(path)
    return load_conversations(DataSpec(path=path, **{"validation": 0.0, **spec}))


def messages(found) -> list[list[dict]]:
    return [json.loads(item["messages"])["messages"] for item in found]


def used(found: Conversations) -> int:
    """Rows that are trained on or held out."""
    return len(found.once) + len(found.validation)


def accounted(found: Conversations) -> bool:
    return found.rows == used(found) + sum(count for count, _ in found.rejected.values())


def test_a_null_in_a_call_or_a_schema_is_kept_where_the_row_says_it(tmp_path, monkeypatch):
    """JSON says null; Arrow fills it in for keys that other rows have. Mutations: strip both; strip neither."""
    call, schema = {"name": "add", "arguments": {"x": None, "y": 1}}, {"name": "add", "default": None}
    said = {**row(), "tools": [{"type": "function", "function": schema}]}
    said["messages"] = [*said["messages"], {"role": "assistant", "tool_calls": [{"function": call, "id": None}]}]
    pq.write_table(pa.Table.from_pylist([said, {**said, "tools": None}]), tmp_path / "x.parquet")
    hub(monkeypatch, "parquet", tmp_path / "x.parquet")
    files = ((write(tmp_path / "x.jsonl", said), True), (tmp_path / "x.parquet", False), ("org/name", False))
    for path, kept in files:
        found = json.loads(load(path).train["messages"][0])
        arguments = {"x": None, "y": 1} if kept else {"y": 1}
        assert found["messages"][2]["tool_calls"] == [
            {"type": "function", "function": {"name": "add", "arguments": arguments}}
        ]
        assert found["tools"][0]["function"] == (schema if kept else {"name": "add"})


BAD = [
    ('{"messages": [', "not valid JSON"),
    ('{"a": 1e999, "messages": []}', "not valid JSON"),
    ('{"a": NaN}', "not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (json.dumps(row("\ud800")), "not text that UTF-8 and JSON can hold (a lone surrogate, a date, too deep)"),
    ("3", f"no known layout in its keys: none; known are {LAYOUTS}"),
    ({"messages": []}, "an empty conversation"),
    ({"messages": ["x"]}, "unknown role: none"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role: narrator"),
    ({"messages": [{"role": "a\x1b[31m", "content": "x"}]}, "unknown role: ..."),
    ({"messages": [{"role": "user", "content": 3}]}, "a content that is not text"),
    ({"messages": [{"role": "user"}]}, "a content that is not text"),
    (row("Hi", " "), "an empty assistant turn"),
    (row("", "Yes"), "an empty user turn"),
    ({"messages": row()["messages"][:1]}, "no assistant turn"),
    ({**row(), "tools": "x"}, "tools that are not a list"),
    ({**row(), "functions": "x"}, "tools that are not a list"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_one_rejected_row_with_its_line(tmp_path, bad, reason):
    """Mutation: read with `load_dataset("json")`, which makes several rows of a lone surrogate."""
    found = load(write(tmp_path / "x.jsonl", row(), "", bad, row(), bad))
    assert (found.rows, used(found), len(found.train)) == (4, 2, 2)
    assert found.rejected == {reason: (2, f"{tmp_path}/x.jsonl:3")}
    assert [item["source"][-2:] for item in found.train] == [":1", ":4"]
    again = load(tmp_path / "x.jsonl")  # from the cache
    assert (again.rows, again.rejected, again.key) == (found.rows, found.rejected, found.key)


def test_rows_that_were_too_large_before_are_not_left_out_by_an_old_cache(tmp_path, monkeypatch):
    """Mutation: the number that the format of cached rows had when a row could be too large."""
    file, too_large = write(tmp_path / "x.jsonl", row(), row("2")), [("x:1", row()), ("x:2", UnusableRow("too large"))]
    with monkeypatch.context() as before:
        before.setattr(sources, "_FORMAT", 5)
        before.setattr(sources, "_line_rows", lambda _: iter(too_large))
        assert used(load(file)) == 1
    assert used(load(file)) == 2


def test_bytes_that_are_not_utf8(tmp_path):
    good = json.dumps(row()).encode() + b"\n"
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\xff\n" + good.rstrip())
    found = load(tmp_path / "x.jsonl")
    assert found.rejected == {"not valid JSON": (1, f"{tmp_path}/x.jsonl:2")}
    assert [item["source"][-2:] for item in found.train] == [":1", ":3"]


def test_json_array_with_lines(tmp_path):
    array = "[\n" + json.dumps(row()) + ",\n" + json.dumps({"messages": []}) + " , " + json.dumps(row("2")) + "\n]\n"
    (tmp_path / "x.json").write_text(array)
    found = load(tmp_path / "x.json")
    assert [item["source"] for item in found.train] == [f"{tmp_path}/x.json:2", f"{tmp_path}/x.json:3"]
    assert found.rejected == {"an empty conversation": (1, f"{tmp_path}/x.json:3")}


@pytest.mark.parametrize(
    "text",
    [
        "[1]\n[2]",
        "[1]]",
        "[] {}",
        '[\n{"a": 1}\n{"b": 2}]',
        "[\n1,",
        "[\n1e999]",
        '[\n"\\ud8"]',
        "[\n" + "[" * 99_999,
        "[\n",
    ],
)
def test_a_broken_json_array_is_an_error_with_its_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/x.json:[123]: not a valid JSON array"):
        load(tmp_path / "x.json")


def test_parquet_and_directory(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([row("p"), {"messages": None}]), folder / "a.parquet")
    write(folder / "b.jsonl", row("l"))
    write(folder / "notes.txt", "not data")
    found = load(folder)
    assert [turns[0]["content"] for turns in messages(found.train)] == ["p", "l"]
    assert found.rejected == {f"no known layout in its keys: none; known are {LAYOUTS}": (1, f"{folder}/a.parquet:2")}
    (folder / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"a.parquet: not a readable Parquet file"):
        load(folder)


def test_what_a_directory_holds_beside_data_files_is_told_of(tmp_path):
    """Fails where data in a folder below, or under another ending, is passed over in silence; what `distill` leaves is
    none."""
    write(tmp_path / "a.jsonl", row("one"), row("two"))
    for name in ("b.JSONL", "c.json.gz", "README.md", ".d.jsonl.swp", "a.jsonl.progress"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    found = load(tmp_path)
    ((number, first),) = found.rejected.values()
    assert (number, first, found.rows, used(found)) == (3, str(tmp_path / "b.JSONL"), 5, 2)


def test_split_never_holds_one_text_on_both_sides(tmp_path):
    """Mutation: split by row."""
    rows = [row(str(number % 60)) for number in range(180)]
    found = load(write(tmp_path / "x.jsonl", *rows), validation=0.2)
    train, held = set(found.train["messages"]), set(found.validation["messages"])
    assert not train & held
    assert 30 <= len(found.validation) <= 36
    assert len(found.train) + len(found.validation) == 180
    assert set(load(tmp_path / "x.jsonl", validation=0.2, seed=1).validation["messages"]) != held
    assert len(load(tmp_path / "x.jsonl", validation=0.2, validation_max=9).validation) == 9


def test_sources_that_share_texts_hold_them_out_together(tmp_path):
    """Mutation: look for held-out texts in `data.validation` alone."""
    first, second = (
        write(tmp_path / f"{name}.jsonl", *[row(str(number)) for number in range(*numbers)])
        for name, numbers in (("first", (0, 60)), ("second", (20, 200)))
    )
    found = load([SourceSpec(path=str(first)), SourceSpec(path=str(second))], validation=0.2)
    assert not set(found.train["messages"]) & set(found.validation["messages"])
    twice, held = found.rejected["stands in data.validation too"][0], len(found.validation)
    assert twice and held == 48 and len(found.train) == 240 - held - twice and accounted(found)


def test_validation_may_be_a_source_of_its_own(tmp_path):
    """What stands in both is left out of training and counted. Mutation: train on it too."""
    file = write(tmp_path / "x.jsonl", *[row(str(number)) for number in range(20)])
    own = write(tmp_path / "own.jsonl", row("held"), row("3"), row("", "x"))
    found = load([SourceSpec(path=str(file))], validation=str(own), validation_max=1)
    assert [turns[0]["content"] for turns in messages(found.validation)] == ["held", "3"]
    assert "3" not in [turns[0]["content"] for turns in messages(found.train)] and len(found.train) == 19
    assert found.rejected["stands in data.validation too"] == (1, f"{file}:4")
    assert accounted(found) and found.rows == 23
    with pytest.raises(UserError, match=r"data.validation: .*none.jsonl: found no such file"):
        load(file, validation=str(tmp_path / "none.jsonl"))


def test_weights_draw_or_repeat_rows(tmp_path):
    half, twice, one_and_a_half = (write(tmp_path / f"{n}.jsonl", *[row(f"{n}{i}") for i in range(10)]) for n in "abc")
    spec = [SourceSpec(path=str(p), weight=w) for p, w in ((half, 0.5), (twice, 2), (one_and_a_half, 1.5))]
    found = load(spec)
    count = {name: [t[0]["content"] for t in messages(found.train) if t[0]["content"][0] == name] for name in "abc"}
    assert (len(count["a"]), len(set(count["a"]))) == (5, 5)
    assert sorted(count["b"]) == sorted([f"b{i}" for i in range(10)] * 2)
    assert (len(count["c"]), len(set(count["c"]))) == (15, 10)
    assert found.rejected["left out by the source's weight"][0] == 5
    assert accounted(found)
    assert messages(load(spec).train) == messages(found.train)
    assert messages(load(spec, seed=1).train) != messages(found.train)


def test_a_directory_may_hold_a_file_that_save_to_disk_writes_too(tmp_path):
    """Mutation: take any `state.json` for a part of a saved data set."""
    for name in ("train.jsonl", "state.json"):
        write(tmp_path / name, row(name))
    assert len(load(tmp_path).train) == 2


def test_sample_brings_its_own_validation_part():
    found = load_conversations(DataSpec(path="sample"))
    assert {item["source"].split(":")[0].rsplit("/", 1)[1] for item in found.validation} == {"validation.jsonl"}
    assert {item["source"].split(":")[0].rsplit("/", 1)[1] for item in found.train} == {"train.jsonl"}
    assert not set(found.train["messages"]) & set(found.validation["messages"])
    assert found.rejected == {}


def test_a_changed_file_is_read_again(tmp_path):
    first = load(write(tmp_path / "x.jsonl", row("1")))
    second = load(write(tmp_path / "x.jsonl", row("2"), row("3")))
    assert (len(first.train), len(second.train)) == (1, 2)
    assert first.key != second.key


@pytest.mark.parametrize(
    ("path", "spec", "found"),
    [
        ("a b c", {}, "data.path: found a b c; allowed are `sample`, an existing file or directory, or a hub id"),
        ("nobody/nothing", {}, r"data.path: nobody/nothing\[train\]: cannot be loaded \(\w+: .*check id, split"),
        ("{tmp}/empty.jsonl", {}, "data.path: .*empty.jsonl: no usable conversation in 0 rows: nothing in it"),
        ("{tmp}/empty.json", {}, "data.path: .*empty.json: no usable conversation in 0 rows: nothing in it"),
        ("{tmp}/bad.jsonl", {}, "bad.jsonl: no usable conversation in 1 row: 1 x not valid JSON, first .*bad.jsonl:1"),
        ("{tmp}/one.json", {}, "in 1 row: 1 x one JSON object over several lines, which is no row a line, first"),
        ("{tmp}/saved", {}, "data.path: .*saved: found a data set of save_to_disk; write it with its to_parquet, and"),
        ("{tmp}/nothing", {}, r"nothing: found no file that ends with .json, .jsonl, .parquet"),
        ("{tmp}/x.csv", {}, r"x.csv: found no file that ends with"),
        ("{tmp}/good.jsonl", {"split": "test"}, "good.jsonl: found split 'test', which only hub datasets have"),
    ],
)
def test_a_source_that_cannot_be_used(tmp_path, path, spec, found):
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "empty.json", "[ ]")
    write(tmp_path / "bad.jsonl", "{")
    write(tmp_path / "one.json", json.dumps({"data": [row()]}, indent=1))
    Dataset.from_list([row()]).save_to_disk(tmp_path / "saved")
    write(tmp_path / "x.csv", "a,b")
    write(tmp_path / "good.jsonl", row())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=found):
        load(path.format(tmp=tmp_path), **spec)


def test_data_held_out_as_a_whole_is_told_of(tmp_path):
    file = write(tmp_path / "x.jsonl", row())
    with pytest.raises(
        UserError, match=r"left to train on: 1 x stands in data.validation too, first .*x.jsonl:1; hold"
    ):
        load(file, validation=str(file))


def hub(monkeypatch, kind: str, *files: Path) -> None:
    """The hub itself is out of reach of tests: local files stand in for those that it names."""
    data_files = {"train": [str(file) for file in files]}
    monkeypatch.setattr(sources, "load_dataset_builder", lambda _: load_dataset_builder(kind, data_files=data_files))


def test_hub_rows_carry_dataset_split_and_row(monkeypatch, tmp_path):
    pq.write_table(pa.Table.from_pylist([row("a"), {"messages": []}, row("b")]), tmp_path / "x.parquet")
    hub(monkeypatch, "parquet", tmp_path / "x.parquet")
    found = load("org/name", split="train[:3]")
    assert [item["source"] for item in found.train] == ["org/name[train[:3]]:0", "org/name[train[:3]]:2"]
    assert found.rejected == {"an empty conversation": (1, "org/name[train[:3]]:1")}
    with pytest.raises(UserError, match=r"org/name\[test\]: cannot be loaded \(ValueError: Unknown split \"test\""):
        load("org/name", split="test")


def test_json_of_the_hub_is_read_as_the_same_file_here(monkeypatch, tmp_path):
    """Mutation: let `datasets` read it, which takes the types of all rows from its first rows."""
    parts = [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]
    rows = [row(f"{number}") for number in range(400)]
    rows += [
        row("list", parts),
        {**row("new key"), "weight": 1},
        row("\ud800"),
        {"messages": json.dumps(row()["messages"])},
    ]
    file = write(tmp_path / "x.jsonl", *rows)
    here = load(file)
    hub(monkeypatch, "json", file)
    there = load("org/name")
    assert there.train["messages"][:] == here.train["messages"][:]
    assert messages(there.train)[400][1]["content"] == "Yes"
    assert [n for n, _ in there.rejected.values()] == [n for n, _ in here.rejected.values()] == [1]
    assert load("org/name", split="train[25%:50%]").train["source"][:] == [
        f"org/name[train[25%:50%]]:{number}" for number in range(101)
    ]
    assert messages(load("org/name", split="train[403:]").train)[0] == row()["messages"]
