"""The layouts in which people publish conversations, all read into one normal form.

A layout is told by the keys of a row; the table of them stands in docs/data.md. Keys that mean something elsewhere are
obeyed, refused by their value, or told of in the row's notes, which the run's report counts: none is dropped silently.

The normal form of a message is a dictionary with

    role                 system, user, assistant or tool
    content              text
    reasoning_content    thoughts before the content, where there are any
    tool_calls           [{"id", "type": "function", "function": {"name", "arguments": object}, "text": arguments}]; the
                         text stands there when the row has it, since some templates write it and some the object
    tool_call_id, name   as in the row
    untrained            why an assistant's turn is not learnt from, such as `weight: 0`
    unfinished           true when the turn was cut off, so that its end is not learnt from
"""

import json
import math
import re
from itertools import cycle
from typing import Any, NamedTuple

Message = dict[str, Any]
LAYOUTS = "messages, conversations, conversation, data, prompt + completion, prompt + chosen, instruction + output"
_LISTS = ("messages", "conversations", "conversation")
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "tool_results"),
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SWITCHES = {"weight", "train", "trainable", "loss_mask", "loss"}
_UNKNOWN = {"mask", "masked", "label", "labels", "learn", "ignore", "prefix", "partial", "refusal"}
_UNKNOWN_OF_ROWS = _SWITCHES | _UNKNOWN | {"images", "videos", "audios"}
_RESERVED = {"chat_template", "tools", "documents", "tokenize", "add_generation_prompt", "continue_final_message"}
_NAME = re.compile(r"[\w.-]{1,40}")


class UnusableRow(Exception):  # noqa: N818 (a verdict on a row, counted by its reason)
    """A conversation that cannot be trained on; the reason is counted and reported."""


class Row(NamedTuple):
    """A row in the normal form.

    `tools`: JSON schemas of functions. `template_args`: the row's own arguments of the chat template, which stand above
    the recipe's. `layout`: how it was recognised. `notes`: what the report counts, an entry each time.
    """

    messages: list[Message]
    tools: list[Any] | None
    template_args: dict[str, Any]
    layout: str
    notes: list[str]

    def text(self) -> str:
        """As JSON, whose keys are arguments of `Chat.encode`.

        Raises:
            ValueError: something in it, as a lone surrogate, is no UTF-8.
        """
        content = {"messages": self.messages, "tools": self.tools}
        text = json.dumps(
            content | ({"template_args": self.template_args} if self.template_args else {}), ensure_ascii=False
        )
        text.encode()
        return text


def read_row(row: Any) -> Row:
    """A row of any layout.

    Raises:
        UnusableRow: of no known layout, or something in it can neither be obeyed nor left aside.
        TypeError, ValueError, RecursionError: it holds what JSON does not.
    """
    if isinstance(row, UnusableRow):
        raise row
    row = _without_none(row) if isinstance(row, dict) else {}
    layout, turns = _find_turns(row)
    notes = [
        f"{key} of a row, which is not known here" for key in sorted(row.keys() & _UNKNOWN_OF_ROWS) if row[key] != []
    ]
    messages = [read_turn(turn, notes) for turn in turns]
    for key in ("system", "system_prompt"):
        if isinstance(row.get(key), str) and messages:
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": row[key]})
            elif row[key].strip() not in ("", messages[0]["content"].strip()):
                notes.append(f"{key} beside a system turn, which stands above it")
    tools = parsed(row.get("tools"))
    if tools is None and isinstance(functions := parsed(row.get("functions")), list):
        tools = [{"type": "function", "function": function} for function in functions]
    if not isinstance(tools, list | None):
        raise UnusableRow("tools that are not a list")
    if layout == "conversations" and tools:  # LLaMA-Factory's are bare schemas
        tools = [{"type": "function", "function": t} if isinstance(t, dict) and "name" in t else t for t in tools]
    args = parsed(row.get("chat_template_kwargs", {}))
    if not isinstance(args, dict) or _RESERVED & args.keys():
        found = ", ".join(sorted(_RESERVED & args.keys())) if isinstance(args, dict) else "no object"
        raise UnusableRow(f"chat_template_kwargs: found {found}; allowed are arguments of the template alone")
    messages = [turn for turn in messages if turn["role"] != "system" or turn["content"].strip()]
    return Row(messages, tools or None, args, layout, notes)


def _find_turns(row: dict[str, Any]) -> tuple[str, list[Any]]:
    """The name of a row's layout, and its turns."""
    for key in _LISTS:
        if isinstance(turns := parsed(row.get(key)), list):
            return key, turns
    texts = row.get("data")
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        roles = cycle(("user", "assistant"))
        return "data", [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for key in ("completion", "chosen"):
        answer = _as_turns(row.get(key), "assistant")
        if answer and answer[0].get("role", answer[0].get("from")) in (*_ROLES["user"], *_ROLES["system"]):
            return key, answer  # the prompt stands in it
        if answer and (prompt := _as_turns(row.get("prompt"), "user")):
            return f"prompt + {key}", prompt + answer
    instruction, output = row.get("instruction"), row.get("output")
    if isinstance(instruction, str) and isinstance(output, str):
        said = [instruction, row["input"]] if row.get("input") else [instruction]
        earlier = [text for pair in row.get("history") or [] for text in pair]
        texts = [*earlier, "\n".join(said), output]
        roles = cycle(("user", "assistant"))
        return "instruction + output", [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
        ]
    keys = ", ".join(sorted(key if _NAME.fullmatch(key) else "..." for key in row)[:8]) or "none"
    raise UnusableRow(f"no known layout in its keys: {keys}; known are {LAYOUTS}")


def _as_turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []


def read_turn(turn: Any, notes: list[str]) -> Message:
    """One turn as a message; notes are added to.

    Raises:
        UnusableRow: see `read_row`.
    """
    turn = turn if isinstance(turn, dict) else {}
    name = turn.get("from", turn.get("role"))
    name = name.strip().lower() if isinstance(name, str) else ""
    role = _ROLE.get(name)
    content, calls = turn.get("value", turn.get("content")), turn.get("tool_calls") or turn.get("function_call") or []
    if role is None:
        raise UnusableRow("unknown role")
    if name == "function_call":
        content, calls = "", parsed(content)
        if not isinstance(calls, dict | list):
            raise UnusableRow("a tool call that is not JSON")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        if not all(str(part.get("type", "text")).endswith("text") for part in content):
            raise UnusableRow("a content with parts that are not text")
        content = "".join(part["text"] for part in content)
    thoughts = next((turn[key] for key in _THOUGHTS if turn.get(key)), "")
    if content is None and (calls or thoughts):
        content = ""
    if not isinstance(content, str):
        raise UnusableRow("a content that is not text")
    if not isinstance(thoughts, str):
        raise UnusableRow("thoughts that are not text")
    if not content.strip() and not calls and not thoughts.strip() and role in ("user", "assistant"):
        raise UnusableRow(f"an empty {role} turn")
    message: Message = {"role": role, "content": content}
    if role == "assistant" and thoughts.strip():
        message["reasoning_content"] = thoughts
    message |= {key: turn[key] for key in ("tool_call_id", "name") if key in turn}
    if role == "assistant" and turn.get("unfinished") is True:
        message["unfinished"] = True
    if calls:
        message["tool_calls"] = [_read_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    for key in sorted(turn.keys() & (_SWITCHES | _UNKNOWN)):
        _obey(key, turn[key], message, notes)
    return message


def _obey(key: str, value: Any, message: Message, notes: list[str]) -> None:
    """A key that says whether a turn is learnt from, or one that says something that is not known here."""
    role = message["role"]
    if key in _UNKNOWN:
        notes.append(f"{key} of a turn, which is not known here")
    elif not isinstance(value, int | float) or value not in (0, 1):
        raise UnusableRow(f"{key} of a turn: found {json.dumps(value)[:40]}; allowed are 0 and 1, false and true")
    elif role == "assistant" and not value:
        message["untrained"] = f"{key}: {json.dumps(value)}"
        notes.append(f"turn that is not learnt from, by {message['untrained']}")
    elif role != "assistant" and value and key != "weight":
        notes.append(f"{key}: {json.dumps(value)} of a turn of the {role}, which heads do not learn from")


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a tool call without a function name")
    arguments = function.get("arguments", {})
    read = {key: call[key] for key in ("id",) if key in call} | {"type": "function"}
    read["function"] = {"name": function["name"], "arguments": parsed(arguments)}
    return read | ({"text": arguments} if isinstance(arguments, str) else {})


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a JSON number in range")
    return float(text)


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
"""Of strict JSON."""


def parsed(value: Any) -> Any:
    """The JSON in a text; anything else as it is."""
    try:
        return DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_none(value: Any) -> Any:
    """Without the nulls that Arrow fills in for keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
