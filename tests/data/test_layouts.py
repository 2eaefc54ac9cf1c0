"""Layouts and keys of rows: each is read as what it says, and what is not followed is counted."""

import json

import numpy as np
import pytest
from small_tokenizers import FAMILIES, tokenizer_of
from test_packing import load

from medusa_ds.data.dialogues import Chat
from medusa_ds.data.layouts import LAYOUTS, UnusableRow, read_row

SYSTEM = {"role": "system", "content": "Be brief."}
U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
SCHEMA = {"name": "add", "parameters": {"type": "object"}}


def share(*turns: dict) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in turns]


LAYOUT_ROWS = [
    ({"messages": [U, A]}, "messages", [U, A]),
    ({"messages": json.dumps([U, A])}, "messages", [U, A]),
    ({"messages": [U, A | {"extra": None, "unfinished": True}]}, "messages", [U, A | {"unfinished": True}]),
    ({"conversations": share(U, A)}, "conversations", [U, A]),
    ({"conversation": [U | {"language": "English", "toxic": False}, A]}, "conversation", [U, A]),
    ({"data": ["Hi", "Yes", "Hi"]}, "data", [U, A, U]),
    ({"prompt": "Hi", "completion": "Yes"}, "prompt + completion", [U, A]),
    ({"prompt": [SYSTEM, U], "completion": [A]}, "prompt + completion", [SYSTEM, U, A]),
    ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "prompt + chosen", [U, A]),
    ({"prompt": [U], "chosen": [A], "rejected": []}, "prompt + chosen", [U, A]),
    ({"prompt": "Hi", "chosen": [U, A], "rejected": [U, A]}, "chosen", [U, A]),
    ({"chosen": [{"role": None, "content": None, **turn} for turn in share(U, A)]}, "chosen", [U, A]),
    ({"instruction": "Hi", "input": "", "output": "Yes"}, "instruction + output", [U, A]),
    (
        {"instruction": "Hi", "input": "there", "output": "Yes", "history": [["Hi", "Yes"]]},
        "instruction + output",
        [U, A, {"role": "user", "content": "Hi\nthere"}, A],
    ),
    ({"conversations": share(U, A), "system_prompt": "Be brief."}, "conversations", [SYSTEM, U, A]),
    ({"messages": [U, A], "system": "Be brief."}, "messages", [SYSTEM, U, A]),
    ({"instruction": "Hi", "output": "Yes", "system": "Be brief."}, "instruction + output", [SYSTEM, U, A]),
    ({"conversations": None, "messages": [U, A]}, "messages", [U, A]),
    ({"messages": [{"role": "system", "content": " "}, U, A], "system": "Be brief."}, "messages", [SYSTEM, U, A]),
    ({"messages": [U, A], "system": "", "system_prompt": "Be brief."}, "messages", [SYSTEM, U, A]),
    ({"messages": [SYSTEM, U, A], "system": " Be brief."}, "messages", [SYSTEM, U, A]),
    ({"conversations": share(U, A), "tools": "", "system": ""}, "conversations", [U, A]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "ai", "value": "Yes"}]}, "conversations", [U, A]),
]


@pytest.mark.parametrize(("row", "layout", "messages"), LAYOUT_ROWS)
def test_a_layout_is_recognised(row, layout, messages):
    """Mutation: leave out a layout; drop the system prompt beside the turns."""
    found = read_row(row)
    assert (found.layout, found.messages, found.notes) == (layout, messages, [])


def test_roles_have_many_names():
    names = "system human gpt user bing tool bard chatgpt".split()
    found = read_row({"conversations": [{"from": name, "value": "x"} for name in names]}).messages
    roles = "system user assistant user assistant tool assistant assistant".split()
    assert found == [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("text", ["content", "value"])
def test_thoughts_have_one_name(key, text):
    turn = {"from": "gpt", text: "Yes", key: "hm"} if text == "value" else {**A, key: "hm"}
    assert read_row({"messages": [U, turn]}).messages[1] == {**A, "reasoning_content": "hm"}
    with pytest.raises(UnusableRow, match="thoughts that are not text"):
        read_row({"messages": [U, {**A, key: 3}]})
    assert read_row({"messages": [{**U, key: "hm"}, A]}).notes == [f"{key} of a turn, which is not known here"]


def test_thoughts_said_twice_are_told():
    turn = {**A, "content": "<think>hm</think>Yes", "reasoning": "hm"}
    assert read_row({"messages": [U, turn]}).notes == [
        "</think> in a content beside thoughts under a key, which stays text"
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm"},
        {"type": "reasoning", "text": "hm"},
        {
            "type": "thinking",
            "thinking": [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}],
            "closed": True,
        },
    ],
)
def test_thoughts_may_be_a_part_of_the_content(part):
    """Mutation: join them to the answer."""
    turn = {"role": "assistant", "content": [part, {"type": "output_text", "text": "Yes"}]}
    assert read_row({"messages": [U, turn]}).messages[1] == {**A, "reasoning_content": "hm"}
    assert read_row({"messages": [{"role": "user", "content": [part, {"text": "Hi"}]}, A]}).notes == [
        "thinking of a turn, which is not known here"
    ]


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("train", False, True),
        ("weight", False, True),
        ("trainable", False, True),
        ("training", False, True),
        ("loss_mask", 0, 1),
        ("loss", False, True),
    ],
)
def test_marks_of_turns_are_obeyed_or_refused_by_value(key, off, on):
    for turn in (A, share(A)[0]):
        found = read_row({"messages": [U, turn | {key: off}, U, turn | {key: on}]})
        assert found.messages == [U, {**A, "untrained": f"{key}: {json.dumps(off)}"}, U, A]
        assert found.notes == [f"turn that is not learnt from, by {key}: {json.dumps(off)}"]
        for value in (0.5, 2, "0", [0]):
            with pytest.raises(
                UnusableRow, match=rf"{key} of a turn: found .*{value if value != [0] else 0}.*; allowed"
            ):
                read_row({"messages": [U, turn | {key: value}]})


UNKNOWN = (
    "mask masked assistant_masks label labels learn ignore prefix partial refusal train_detail loss_weight loss_scale"
    " trained reasoning_details enable_thinking thought finish_reason images audio"
).split()


@pytest.mark.parametrize("key", UNKNOWN)
def test_keys_that_are_not_known_are_counted(key):
    assert read_row({"messages": [U, {**A, key: "x"}]}).notes == [f"{key} of a turn, which is not known here"]
    assert read_row({"prompt": "Hi", "completion": "Yes", key: False}).notes == [
        f"{key} of a row, which is not known here"
    ]
    assert read_row({"messages": [U, {**A, key: None}], key: []}).notes == []
    assert read_row({"messages": [U, {**A, "language": "en", "constraint": 1}], "source": "x", "id": 3}).notes == []
    assert read_row({"messages": [U, A], "system": 3}).notes == ["system of a row, which is not text"]
    assert read_row({"messages": [SYSTEM, U, A], "system": "Other."}).notes == [
        "system beside a system turn, which stands above it"
    ]
    assert read_row({"messages": [{**U, "loss_mask": 1}, A]}).notes == [
        "loss_mask: 1 of a turn of the user, which heads do not learn from"
    ]


NORMAL_CALL = {**CALL, "function": {"name": "add", "arguments": {"x": 2}}}
CALLS = [
    ("object", {"role": "assistant", "tool_calls": [CALL]}, NORMAL_CALL),
    (
        "text",
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"x": 2}'}}]},
        {**NORMAL_CALL, "text": '{"x": 2}'},
    ),
    ("flat", {"role": "assistant", "tool_calls": [{**CALL["function"], "function": None}]}, NORMAL_CALL),
    (
        "old OpenAI",
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"x": 2}'}},
        {**NORMAL_CALL, "text": '{"x": 2}'},
    ),
    ("ShareGPT", {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2}}'}, NORMAL_CALL),
    ("ms-swift", {"role": "tool_call", "content": '{"name": "add", "arguments": {"x": 2}}'}, NORMAL_CALL),
    ("JSON text", {"role": "assistant", "tool_calls": json.dumps([CALL | {"id": None}])}, NORMAL_CALL),
]


@pytest.mark.parametrize(("name", "turn", "call"), CALLS)
@pytest.mark.parametrize("result", ["tool", "function", "observation", "ipython", "tool_response"])
def test_calls_and_results_of_all_kinds(name, turn, call, result):
    answer = {"role": result, "content": "4"} if "role" in turn else {"from": result, "value": "4"}
    found = read_row({"messages": [U, turn, answer, A], "functions": [SCHEMA]})
    assert found.messages == [
        U,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        A,
    ]
    assert found.tools == [{"type": "function", "function": SCHEMA}]
    assert read_row({"conversations": [U, A], "tools": json.dumps([SCHEMA])}).tools == found.tools


@pytest.mark.parametrize("result", [{"sum": 4, "rest": None}, [4, "é"], [{"sum": 4}]])
def test_a_result_that_is_an_object_becomes_its_json(result):
    found = read_row({"messages": [U, {"role": "tool", "content": result}, A]}).messages[1]["content"]
    assert json.loads(found) == result and "\\u" not in found
    parts = {"role": "tool", "content": [{"type": "text", "text": "4"}]}
    assert read_row({"messages": [U, parts, A]}).messages[1]["content"] == "4"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x", "meta": 1}, f"no known layout in its keys: meta, text; known are {LAYOUTS}"),
        ({"a\nb": 1}, "no known layout in its keys: ...; known are"),
        ({"prompt": "Hi", "rejected": "No"}, "in its keys: prompt, rejected"),
        ({"messages": [U, {"from": "function_call", "value": "add it"}]}, "a tool call that is not JSON"),
        ({"messages": [U, {**A, "content": [{"type": "image_url", "text": "x"}]}]}, "are not text: image_url"),
        ({"messages": [U, {**A, "content": ["x"]}]}, "parts that are not text: str"),
        ({"messages": [U, {**A, "content": [{"type": "text"}]}]}, "parts that are not text: text"),
        ({"messages": [U, {**A, "tool_calls": "add"}]}, "a tool call without a function name"),
        ({"messages": [U, A], "chat_template_kwargs": {"chat_template": "x"}}, "found chat_template; allowed are"),
        ({"messages": [U, A], "chat_template_kwargs": [1]}, "found no object; allowed are"),
        *(
            ({"instruction": "Hi", "output": "Yes", "history": history}, "a history that is not pairs")
            for history in (["Hi", "Yes"], "Hi", {"Hi": "Yes"}, [["Hi"]], [["Hi", "Yes", "No"]], [{"a": 1, "b": 2}], 3)
        ),
    ],
)
def test_what_cannot_be_read_has_a_reason(row, reason):
    with pytest.raises(UnusableRow) as caught:
        read_row(row)
    assert reason in str(caught.value)


def rows_of(texts: list[str]) -> dict[str, dict]:
    """One conversation in every layout that can hold it."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    pairs = [texts[n : n + 2] for n in range(0, len(texts) - 2, 2)]
    return {
        "messages": {"messages": turns},
        "JSON text": {"messages": json.dumps(turns)},
        "parts": {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]},
        "conversations": {"conversations": share(*turns)},
        "conversation": {"conversation": turns},
        "data": {"data": texts},
        "completion": {"prompt": turns[:-1], "completion": turns[-1:]},
        "chosen": {"prompt": turns[:-1], "chosen": texts[-1]},
        "whole chosen": {"prompt": texts[0], "chosen": turns, "rejected": turns},
        "Alpaca": {"instruction": texts[-2], "input": "", "output": texts[-1], "history": pairs},
    }


WORDS = "two four Hi there what is said <|im_end|> </s> é 中 \n 12 . <b>".split(" ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_every_layout_gives_what_chat_messages_give(family, seed):
    """Random conversations, fixed seeds."""
    draw = np.random.default_rng([seed, 26])
    texts = ["x" + " ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(2 * draw.integers(1, 4))]
    chat = Chat(tokenizer_of(family), {})
    encoded = {name: chat.encode(**json.loads(read_row(row).text())) for name, row in rows_of(texts).items()}
    assert all(found == encoded["messages"] for found in encoded.values())
    if not any(word in " ".join(texts) for word in WORDS[7:9]):
        turns = rows_of(texts)["messages"]["messages"]
        assert encoded["messages"].input_ids == chat.tokenizer.apply_chat_template(turns, return_dict=False)


def test_rows_in_are_rows_used_and_rows_left_out(tmp_path):
    """And what used rows say that is not followed is counted with its first row. Mutation: drop the notes."""
    draw = np.random.default_rng(26)
    rows: list[dict] = []
    for number in range(120):
        made = rows_of([f"x{number} {word}" for word in draw.choice(WORDS[:5], 4)])
        rows.append(made[str(draw.choice(list(made)))])
    rows[10:10] = [{"text": "x"}, {"messages": [U, {**A, "weight": 0.5}]}, {"messages": [U, {**A, "train": False}]}]
    rows[50:50] = [
        {"messages": [U, {**A, "loss_mask": 0}, U, {**A, "mask": 1}]},
        {"messages": [U, A, U, A | {"mask": 1}]},
    ]
    rows.append({"messages": [U, {**A, "reasoning": "hm"}]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(file, "smollm2", max_length=256)
    rejected = data.report["rejected"]
    assert data.report["rows"] == 126 == data.report["used"] + sum(count for count, _ in rejected.values())
    assert {reason.split(":")[0]: found for reason, found in rejected.items()} == {
        "no known layout in its keys": (1, f"{file}:11"),
        "weight of a turn": (1, f"{file}:12"),
        "every assistant turn is marked as one not to learn from": (1, f"{file}:13"),
    }
    assert {note: count for note, (count, _) in data.report["notes"].items()} == {
        "turn that is not learnt from, by loss_mask: 0": 1,
        "mask of a turn, which is not known here": 2,
        "thoughts, which the chat template does not read": 1,
    }
    assert (
        f"in rows that were used: 1 x turn that is not learnt from, by loss_mask: 0 (first: {file}:51)"
        in data.summary(4)
    )
