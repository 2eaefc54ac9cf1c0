"""Messages become token ids and labels by the model's own chat template: the only place that renders one.

The template is rendered with marks around every message, so that the rendered text says where each one lies, however
often its text repeats. An assistant turn begins where the prompt that the template writes for it ends and ends with the
special token that the template writes after it. Ids are those of one tokenizer call over the whole rendered text, as
`apply_chat_template` gives them, except that control tokens spelled out in a message stay text. What the template knows
(under which name it reads thoughts, whether it takes a call's arguments as an object or as text, what ends a turn) is
found by trying it. What cannot be masked exactly is refused, never guessed.
"""

import json
import re
from collections.abc import Callable, Collection
from functools import cached_property
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_ds.data.layouts import ROLES, THOUGHTS, Message, UnusableRow
from medusa_ds.data.marks import BEGIN, BORDER, CLOSE, IGNORED, PLANE_16, Coder, Encoded, opening, wrap
from medusa_ds.errors import UserError

MAX_MESSAGES = 1000  # the work grows with their square
_CLOSED = re.compile(r"\s*</think>\s*")
_PROBE = "probe7243"
_TURNS = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Two.")]
_PLAIN = [{"role": role, "content": text} for role, text in _TURNS]  # the least that every chat template takes


class Chat:
    """A fast tokenizer and the chat template in force, `template`; a tokenizer can have another one for tools.

    `template_args` are arguments of the chat template, such as `enable_thinking`, or a `chat_template` of one's own.

    Raises:
        UserError: the tokenizer has no chat template or is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_args: dict[str, Any]) -> None:
        self.tokenizer, self.args, self.coder = tokenizer, template_args, Coder(tokenizer)
        self.name = tokenizer.name_or_path or "model.name"
        try:
            self.template = tokenizer.get_chat_template(template_args.get("chat_template"), None)
        except ValueError:
            raise UserError(
                f"{self.name}: its tokenizer has no chat template, or several of which none is called default; choose "
                "a chat model, or write a Jinja template as data.template_args.chat_template"
            ) from None

    def check(self) -> None:
        """Try the template on a plain conversation of two rounds.

        Raises:
            UserError: assistant turns cannot be told exactly from the rest, or BOS is written twice.
        """
        try:
            ids = self._encode(_PLAIN).input_ids
        except UnusableRow as error:
            raise UserError(
                f"{self.name}: its chat template cannot be masked exactly ({error}); set another one as "
                "data.template_args.chat_template"
            ) from None
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos] * 2:
            raise UserError(
                f"{self.name}: its chat template writes BOS twice; mend it as data.template_args.chat_template"
            )

    @cached_property
    def ends(self) -> frozenset[int]:
        """The token with which the template ends a plain turn; nothing where turns cannot be told from the rest."""
        try:
            labels = self._encode(_PLAIN).labels
        except UnusableRow:
            return frozenset()
        first = next(k for k, label in enumerate(labels) if label != IGNORED)
        return frozenset({labels[labels.index(IGNORED, first) - 1]})

    @cached_property
    def thoughts_key(self) -> str | None:
        """The key of a message under which the template reads its thoughts; None: it reads none."""
        answer = {"role": "assistant", "content": "Two."}
        return next((key for key in THOUGHTS if _PROBE in self._try([_PLAIN[0], answer | {key: _PROBE}])), None)

    @cached_property
    def arguments(self) -> str | None:
        """What the template writes a tool call's arguments from: an `object` or `text`; None: it writes no calls."""
        found = {"x": _PROBE}
        for form, arguments in (("object", found), ("text", json.dumps(found))):
            call = {"id": "probe7243", "type": "function", "function": {"name": "f", "arguments": arguments}}
            text = self._try([_PLAIN[0], {"role": "assistant", "content": "", "tool_calls": [call | {"id": "x" * 9}]}])
            if _PROBE in text and str(found) not in text:  # an object joined to text shows as Python writes it
                return form
        return None

    def encode(
        self, messages: list[Message], tools: list[Any] | None = None, template_args: dict[str, Any] | None = None
    ) -> Encoded:
        """Tokenise a conversation and label the assistant's turns, each with the token that ends it.

        Args:
            messages: in the normal form of `layouts`. A turn with `untrained` has no label, nor has the end of a turn
                with `unfinished`, which was cut off: the template wrote it and not the model.
            tools: JSON schemas of functions.
            template_args: the row's own, above the recipe's.

        Raises:
            UnusableRow: no assistant turn, an unknown role, too many messages, or the template refuses or alters them.
        """
        try:
            return self._encode(messages, tools, template_args, self.ends)
        except UnusableRow:
            if any(message.get("tool_calls") for message in messages) and self.arguments is None:
                raise UnusableRow(
                    "tool calls, of which the chat template writes none; give another one as "
                    "data.template_args.chat_template (docs/data.md has an example)"
                ) from None
            raise

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's next turn begins.

        Raises:
            UnusableRow: see `encode`.
        """
        _check(messages, None)
        return self.coder.ids(self._render([self._marked(messages)], True)[0])

    def before_prompt(self) -> str:
        """What the template writes before a user's first turn."""
        return self._render([[{"role": "user", "content": _PROBE}]], False)[0].partition(_PROBE)[0]

    @cached_property
    def schemas(self) -> bool:
        """Whether the template writes schemas of functions."""
        function = {"name": _PROBE, "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
        return _PROBE in self._try(_PLAIN[:1], [{"type": "function", "function": function}])

    def unread(self, messages: list[Message], tools: list[Any] | None) -> list[str]:
        """Notes on what the template leaves out of a conversation."""
        found = {
            "thoughts": self.thoughts_key is None and any("reasoning_content" in message for message in messages),
            "tool calls": self.arguments is None and any("tool_calls" in message for message in messages),
            "schemas of functions": bool(tools) and not self.schemas,
        }
        return [f"{what}, which the chat template does not read" for what, left_out in found.items() if left_out]

    def _encode(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        template_args: dict[str, Any] | None = None,
        ends: Collection[int] = (),
    ) -> Encoded:
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise UnusableRow("no assistant turn")
        _check(messages, tools)
        turns = [turn for turn in turns if "untrained" not in messages[turn]]
        if turns[:1] == [0]:
            raise UnusableRow("begins with an assistant turn")
        marked = self._marked(messages)
        without_borders = json.loads(BORDER.sub("", json.dumps(marked, ensure_ascii=False)))
        full, plain = self._render([marked, without_borders], False, tools, template_args)
        if BORDER.sub("", full) != BORDER.sub("", plain):
            raise UnusableRow("the chat template alters a message's text")
        prompts = self._render([marked[:turn] for turn in turns], True, tools, template_args) if turns else []
        if turns and messages[0]["role"] == "system" and opening(0) not in full and opening(0) in prompts[-1]:
            # Mistral's template writes the system turn into the last user turn, but only when that one comes last.
            inside, begin = _begin(full, turns[-1], prompts[-1])
            full = prompts[-1][:inside] + full[begin:]
        for turn, prompt in reversed(list(zip(turns, prompts, strict=True))):
            begin = _begin(full, turn, prompt)[1]
            full = full[:begin] + BEGIN + full[begin:]
        unfinished = {i for i in turns if messages[i].get("unfinished")}
        return self.coder.encode(full, turns, unfinished, ends, ends_in_call="tool_calls" in messages[-1])

    def _render(
        self,
        conversations: list[list[Message]],
        prompt: bool,
        tools: list[Any] | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> list[str]:
        """What the template makes of each conversation, up to the assistant's next turn if `prompt` says so."""
        args = self.args | self.coder.hide(template_args or {})
        args |= {"tokenize": False, "add_generation_prompt": prompt}
        try:
            return list(self.tokenizer.apply_chat_template(conversations, self.coder.hide(tools), **args))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise UnusableRow(f"the chat template refuses it: {why}") from None

    def _try(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """What the template makes of messages; nothing where it refuses them."""
        try:
            return self._render([messages], False, tools)[0]
        except UnusableRow:
            return ""

    def _marked(self, messages: list[Message]) -> list[Message]:
        """Messages as the template reads them, what they say wrapped in marks and control tokens in it broken."""
        return [self._mark(message, i) for i, message in enumerate(messages)]

    def _mark(self, message: Message, index: int) -> Message:
        def mark(text: str) -> str:
            return wrap(self.coder.hide(text), index)

        content, thoughts = message.get("content"), message.get("reasoning_content")
        out = {"role": message["role"], "content": content}
        if isinstance(content, str):
            parts = _inline_thoughts(content) if message["role"] == "assistant" and not thoughts else [content]
            out["content"] = "".join(part if part.strip() in ("<think>", "</think>") else mark(part) for part in parts)
        if thoughts:
            out[self.thoughts_key or THOUGHTS[0]] = mark(thoughts)
        out |= {key: self.coder.hide(message[key]) for key in ("tool_call_id", "name") if key in message}
        if calls := message.get("tool_calls"):
            out["tool_calls"] = [self._mark_call(call, mark) for call in calls]
        return out

    def _mark_call(self, call: dict[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = call.get("text") or json.dumps(arguments, ensure_ascii=False)
        marked = {"name": mark(function["name"]), "arguments": self.coder.hide(arguments)}
        return {key: value for key, value in call.items() if key != "text"} | {"function": marked}


def describe(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example for a terminal, its supervised tokens in green."""
    supervised = np.asarray(example.labels) != IGNORED
    runs = groupby(range(len(supervised)), lambda at: bool(supervised[at]))
    texts = [(green, str(tokenizer.decode([example.input_ids[at] for at in run]))) for green, run in runs]
    return "".join(f"\x1b[32m{text}\x1b[0m" if green else text for green, text in texts)


def _check(messages: list[Message], tools: list[Any] | None) -> None:
    if any(message.get("role") not in ROLES for message in messages):
        raise UnusableRow("unknown role")
    if len(messages) > MAX_MESSAGES:
        raise UnusableRow(f"more than {MAX_MESSAGES} messages")
    if PLANE_16.search(json.dumps([messages, tools], ensure_ascii=False)):
        raise UnusableRow("private-use characters of plane 16")


def _inline_thoughts(content: str) -> list[str]:
    """A content cut at the model's own tags, which templates look for; the prompt may have written the first one."""
    before, closing, answer = content.partition("</think>")
    lead, tag, thoughts = before.rpartition("<think>")
    if not closing or lead.strip() or "</think>" in answer or "<think>" in lead + answer:
        return [content]  # no tags, or talk of tags
    return [lead + tag, thoughts, closing, answer]


def _begin(full: str, turn: int, prompt: str) -> tuple[int, int]:
    """Where an assistant turn begins: in the prompt that asks for it, and in the whole conversation.

    Both agree from the end of the last message before the turn up to there. The prompt may go on where history is
    written without it (`<think>` blocks), but then the turn's own text or whitespace follows at once. Where the prompt
    opens a block of thoughts of which the turn has none, the turn begins behind the block: the template closed it and
    not the model.
    """
    first = full.find(opening(turn))
    if first < 0:
        raise UnusableRow("the chat template leaves out an assistant turn")
    anchor = prompt.rfind(CLOSE)
    found = full.rfind(prompt[anchor : anchor + 2], 0, first) if anchor >= 0 else -2
    if anchor >= 0 and found < 0:
        raise UnusableRow("the chat template leaves out the turn before an assistant turn")
    tail, piece = prompt[anchor + 2 if anchor >= 0 else 0 :], full[found + 2 : first]
    if "<think>" not in piece:
        tail = tail.partition("<think>")[0]
    common = next((n for n, (a, b) in enumerate(zip(tail, piece, strict=False)) if a != b), min(len(tail), len(piece)))
    if common < min(len(tail), len(piece)) and piece[common:].strip():
        raise UnusableRow("the chat template writes a turn differently when it asks for it")
    closed = _CLOSED.match(piece, common) if "<think>" in tail else None
    return anchor + 2 + common if anchor >= 0 else common, found + 2 + (closed.end() if closed else common)
