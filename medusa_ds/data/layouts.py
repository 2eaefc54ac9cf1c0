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
import re
from itertools import cycle
from typing import Any, NamedTuple

from medusa_ds.config.parsing import finite

Message = dict[str, Any]
LAYOUTS = "messages, conversations, conversation, data, prompt + completion, prompt + chosen, instruction + output"
_LISTS = ("messages", "conversations", "conversation")
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "ipython", "tool_results", "tool_response"),
}
_ROLE = {name: role for role, names in ROLES.items() for name in names}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # in rows, and the names under which templates read them
_SWITCHES = {"weight", "train", "trainable", "training", "loss_mask", "loss"}
_MEANING = re.compile(  # of a key with one of these words, which says something wherever it is known
    r"(\w*_)?(mask(s|ed)?|weights?|train(able|ed|ing)?|loss|labels?|learn|ignored?|prefix|partial|refusal"
    r"|reason(ing)?|think(ing)?|thoughts?|(image|video|audio)s?)(_\w*)?"
)
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "unfinished"}
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
        content: dict[str, Any] = {"messages": self.messages, "tools": self.tools}
        if self.template_args:
            content["template_args"] = self.template_args
        text = json.dumps(content, ensure_ascii=False)
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
    row = _given(row)
    layout, turns = _find_turns(row)
    unread = [key for key in sorted(row) if _MEANING.fullmatch(key) and row[key] not in ("", [], {})]
    notes = [f"{_named(key)} of a row, which is not known here" for key in unread]
    messages = [_read_turn(turn, notes) for turn in turns]
    messages = [turn for turn in messages if turn["role"] != "system" or turn["content"].strip()]
    for key in ("system", "system_prompt"):
        text = row.get(key) or ""
        if not isinstance(text, str):
            notes.append(f"{key} of a row, which is not text")
        elif text.strip() and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": text})
        elif text.strip() and messages and text.strip() != messages[0]["content"].strip():
            notes.append(f"{key} beside a system turn, which stands above it")
    tools, functions = (parsed(row.get(key)) or None for key in ("tools", "functions"))
    if not isinstance(tools, list | None) or not isinstance(functions, list | None):
        raise UnusableRow("tools that are not a list")
    if tools is None and functions:
        tools = [{"type": "function", "function": function} for function in functions]
    if layout == "conversations" and tools:  # LLaMA-Factory's are bare schemas
        tools = [{"type": "function", "function": t} if isinstance(t, dict) and "name" in t else t for t in tools]
    args = parsed(row.get("chat_template_kwargs", {}))
    if not isinstance(args, dict) or _RESERVED & args.keys():
        found = ", ".join(sorted(_RESERVED & args.keys())) if isinstance(args, dict) else "no object"
        raise UnusableRow(f"chat_template_kwargs: found {found}; allowed are arguments of the template alone")
    return Row(messages, tools, args, layout, notes)


def _find_turns(row: dict[str, Any]) -> tuple[str, list[Any]]:
    """The name of a row's layout, and its turns."""
    for key in _LISTS:
        if isinstance(turns := parsed(row.get(key)), list):
            return key, turns
    texts = row.get("data")
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return "data", _in_turn(texts)
    for key in ("completion", "chosen"):
        answer = _as_turns(row.get(key), "assistant")
        if answer and (answer[0].get("role") or answer[0].get("from")) in (*ROLES["user"], *ROLES["system"]):
            return key, answer  # the prompt stands in it
        if answer and (prompt := _as_turns(row.get("prompt"), "user")):
            return f"prompt + {key}", prompt + answer
    instruction, output = row.get("instruction"), row.get("output")
    if isinstance(instruction, str) and isinstance(output, str):
        said = [instruction, row["input"]] if row.get("input") else [instruction]
        history: Any = parsed(row.get("history")) or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise UnusableRow("a history that is not pairs of what the user and the assistant said")
        earlier = [text for pair in history for text in pair]
        return "instruction + output", _in_turn([*earlier, "\n".join(said), output])
    keys = ", ".join(sorted(_named(key) for key in row)[:8]) or "none"
    raise UnusableRow(f"no known layout in its keys: {keys}; known are {LAYOUTS}")


def _in_turn(texts: list[Any]) -> list[Any]:
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts, strict=False)]


def _as_turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []


def _read_turn(turn: Any, notes: list[str]) -> Message:
    """One turn as a message, or an `UnusableRow` as of `read_row`; notes are added to."""
    turn = _given(turn)
    name = turn.get("from", turn.get("role"))
    name = name.strip().lower() if isinstance(name, str) else ""
    role = _ROLE.get(name)
    content, calls = turn.get("value", turn.get("content")), turn.get("tool_calls") or turn.get("function_call") or []
    if role is None:
        raise UnusableRow(f"unknown role: {_named(name)}")
    calls = parsed(calls)
    if name in ("function_call", "tool_call"):
        content, calls = "", parsed(content)
        if not isinstance(calls, dict | list):
            raise UnusableRow("a tool call that is not JSON")
    if role == "tool" and isinstance(content, dict | list) and not _are_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        content, inner = _join(content)
        turn |= {"thinking": inner} if inner else {}
    thoughts = next((turn[key] for key in THOUGHTS if turn.get(key)), "") if role == "assistant" else ""
    if content is None and (calls or thoughts):
        content = ""
    if not isinstance(content, str):
        raise UnusableRow("a content that is not text")
    if not isinstance(thoughts, str):
        raise UnusableRow("thoughts that are not text")
    if not content.strip() and not calls and not thoughts.strip() and role in ("user", "assistant"):
        raise UnusableRow(f"an empty {role} turn")
    message: Message = {"role": role, "content": content}
    if thoughts.strip():
        message["reasoning_content"] = thoughts
        if "</think>" in content:
            notes.append("</think> in a content beside thoughts under a key, which stays text")
    message |= {key: turn[key] for key in ("tool_call_id", "name") if key in turn}
    if role == "assistant" and turn.get("unfinished") is True:
        message["unfinished"] = True
    if calls:
        message["tool_calls"] = [_read_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    for key in sorted(turn.keys() - _READ):
        if key in _SWITCHES:
            _obey(key, turn[key], message, notes)
        elif _MEANING.fullmatch(key) and (role != "assistant" or key not in THOUGHTS):
            notes.append(f"{_named(key)} of a turn, which is not known here")
    return message


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _join(parts: list[Any]) -> tuple[str, str]:
    """The content and the thoughts in a list of parts."""
    texts: tuple[list[str], list[str]] = ([], [])
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        thinks = kind in ("thinking", "reasoning")
        text = part.get("text", part.get(kind)) if thinks or str(kind).endswith("text") else None
        text = _join(text)[0] if thinks and isinstance(text, list) else text
        if not isinstance(text, str):
            raise UnusableRow(f"a content with parts that are not text: {_named(str(kind))}")
        texts[thinks].append(text)
    return "".join(texts[0]), "".join(texts[1])


def _obey(key: str, value: Any, message: Message, notes: list[str]) -> None:
    """A key that says whether a turn is learnt from."""
    role = message["role"]
    if not isinstance(value, int | float) or value not in (0, 1):
        raise UnusableRow(f"{key} of a turn: found {json.dumps(value)[:40]}; allowed are 0 and 1, false and true")
    if role == "assistant" and not value:
        message["untrained"] = f"{key}: {json.dumps(value)}"
        notes.append(f"turn that is not learnt from, by {message['untrained']}")
    elif role != "assistant" and value and key != "weight":
        notes.append(f"{key}: {json.dumps(value)} of a turn of the {role}, which heads do not learn from")


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a tool call without a function name")
    arguments = {} if function.get("arguments") is None else function["arguments"]
    read = {"id": call["id"]} if call.get("id") is not None else {}
    read |= {"type": "function", "function": {"name": function["name"], "arguments": parsed(arguments)}}
    return read | ({"text": arguments} if isinstance(arguments, str) else {})


DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite)
"""Of strict JSON."""


def parsed(value: Any) -> Any:
    """The JSON in a text; anything else as it is."""
    try:
        return DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _given(value: Any) -> dict[str, Any]:
    """An object without the keys that it leaves open; nothing where it is no object."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}


def _named(name: str) -> str:
    """A name from a row as a reason may hold it, which is printed."""
    return name if _NAME.fullmatch(name) else "..." if name else "none"
