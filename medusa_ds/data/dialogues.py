"""Messages become token ids and labels by the model's own chat template.

The template is rendered with private-use marks around every message, so that the rendered text says where each one
lies, however often its text repeats. An assistant turn begins where the prompt that the template writes for it ends
and ends with the special token that the template writes after it. Ids are those of one tokenizer call over the whole
rendered text, as `apply_chat_template` gives them, except that control tokens spelled out in a message (`<|im_end|>`
typed by a user) stay text: they are hidden from the template by a mark and tokenised by a copy of the tokenizer that
knows no added tokens. What cannot be masked exactly is refused, never guessed.
"""

import copy
import json
import re
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import jinja2
import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from medusa_ds.errors import UserError

IGNORED = -100
ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 1000  # the work grows with their square
# Marks, all of plane 16, which no message may contain: content of message i is OPEN i ... CLOSE i.
_OPEN, _CLOSE, _BEGIN, _BREAK, _FILL, _CONTROL = (chr(0x10FFF0 + n) for n in range(6))
_INDEX = 0x100000
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]([{chr(_INDEX)}-{chr(0x10FFEF)}])|[{_BEGIN}{_BREAK}]")
_PLANE_16 = re.compile(f"[{chr(_INDEX)}-{chr(0x10FFFF)}]")
_THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

# Vicuna's tokenizer ships no template; FastChat's conversation format `vicuna_v1.1` in Jinja.
VICUNA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = 'A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}{% endif %}{{ system + ' ' }}{% for turn in turns %}"
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class UnusableRow(Exception):  # noqa: N818 (a verdict on a row, counted by its reason)
    """A conversation that cannot be trained on; the reason is counted and reported."""


class Encoded(NamedTuple):
    """One conversation: ids, and labels that are the id where a token is the assistant's, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]


def encode(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_args: dict[str, Any],
    tools: list[Any] | None = None,
) -> Encoded:
    """Tokenise a conversation and label the assistant's turns, each with the token that ends it.

    Args:
        messages: dicts with `role` (`ROLES`), `content` and what else the template knows. The end of a turn
            with `unfinished: True`, which was cut off, has no label: the template wrote it and not the model.
        tokenizer: a fast tokenizer.
        template_args: arguments of the chat template, such as `enable_thinking`.
        tools: JSON schemas of functions.

    Raises:
        UnusableRow: no assistant turn, an unknown role, too many messages, or the template refuses or alters them.
        UserError: the tokenizer has no chat template or is not a fast one.
    """
    coder = _coder(tokenizer, len(tokenizer))
    template = chat_template(tokenizer, template_args, tools)
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise UnusableRow("no assistant turn")
    if any(message.get("role") not in ROLES for message in messages):
        raise UnusableRow("unknown role")
    if len(messages) > MAX_MESSAGES:
        raise UnusableRow(f"more than {MAX_MESSAGES} messages")
    if turns[0] == 0:
        raise UnusableRow("begins with an assistant turn")
    if _PLANE_16.search(json.dumps([messages, tools], ensure_ascii=False)):
        raise UnusableRow("private-use characters of plane 16")
    if "reasoning_content" in template:
        messages = [_move_thinking(message) for message in messages]
    hidden = [{key: value if key == "role" else coder.hide(value) for key, value in m.items()} for m in messages]
    hidden_tools = coder.hide(tools)
    marked = [_mark(message, i) for i, message in enumerate(hidden)]

    def render(conversation: list[dict[str, Any]], prompt: bool = False) -> str:
        args = {**template_args, "chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return str(tokenizer.apply_chat_template(conversation, hidden_tools, **args))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise UnusableRow(f"the chat template refuses it: {why}") from None

    full = render(marked)
    if _MARK.sub("", full) != _MARK.sub("", render(hidden)):
        raise UnusableRow("the chat template alters a message's text")
    prompts = [render(marked[:i], prompt=True) for i in turns]
    if messages[0]["role"] == "system" and f"{_OPEN}{chr(_INDEX)}" not in full and _OPEN + chr(_INDEX) in prompts[-1]:
        # Mistral's template writes the system turn into the last user turn, but only when that one comes last.
        inside, begin = _begin(full, turns[-1], prompts[-1])
        full = prompts[-1][:inside] + full[begin:]
    for i, prompt in reversed(list(zip(turns, prompts, strict=True))):
        begin = _begin(full, i, prompt)[1]
        full = full[:begin] + _BEGIN + full[begin:]
    return coder.encode(full, turns, {i for i in turns if messages[i].get("unfinished")})


def chat_template(tokenizer: PreTrainedTokenizerBase, template_args: dict[str, Any], tools: list[Any] | None) -> str:
    """The template in force: of `template_args`, of the tokenizer, or of a family whose tokenizers ship none.

    Raises:
        UserError: there is none.
    """
    given = template_args.get("chat_template")
    if given is None and tokenizer.chat_template is None:
        if "vicuna" in tokenizer.name_or_path.lower():
            return VICUNA
        raise UserError(
            f"{tokenizer.name_or_path or 'model.name'}: its tokenizer has no chat template; choose a chat model, or "
            "write a Jinja template as data.template_args.chat_template"
        )
    return tokenizer.get_chat_template(given, tools)


def check_template(tokenizer: PreTrainedTokenizerBase, template_args: dict[str, Any]) -> None:
    """Try the template on a plain conversation of two rounds, the least that every chat template takes.

    Raises:
        UserError: assistant turns cannot be told exactly from the rest, or BOS is written twice.
    """
    name = tokenizer.name_or_path or "model.name"
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Two.")]
    try:
        ids = encode([{"role": role, "content": text} for role, text in turns], tokenizer, template_args).input_ids
    except UnusableRow as error:
        raise UserError(
            f"{name}: its chat template cannot be masked exactly ({error}); set another one as "
            "data.template_args.chat_template"
        ) from None
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(f"{name}: its chat template writes BOS twice; mend it as data.template_args.chat_template")


def describe(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example for a terminal, its supervised tokens in green."""
    supervised = np.asarray(example.labels) != IGNORED
    runs = groupby(range(len(supervised)), lambda at: bool(supervised[at]))
    texts = [(green, str(tokenizer.decode([example.input_ids[at] for at in run]))) for green, run in runs]
    return "".join(f"\x1b[32m{text}\x1b[0m" if green else text for green, text in texts)


def _move_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning written inside the content goes where the template looks for it, which then writes the tags itself."""
    match = _THINKING.fullmatch(message.get("content") or "")
    if message["role"] != "assistant" or message.get("reasoning_content") or not match:
        return message
    return {**message, "reasoning_content": match[1].strip("\n"), "content": match[2].lstrip("\n")}


def _mark(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Wrap what a message says in marks, inside its outer whitespace, which templates trim."""

    def wrap(holder: dict[str, Any], key: str) -> None:
        core = holder[key].strip() if isinstance(holder.get(key), str) else ""
        if core:
            wrapped = f"{_OPEN}{chr(_INDEX + index)}{core}{_CLOSE}{chr(_INDEX + index)}"
            holder[key] = holder[key].replace(core, wrapped, 1)

    message = copy.deepcopy(message)
    wrap(message, "content")
    wrap(message, "reasoning_content")
    for call in message.get("tool_calls") or []:
        wrap(call.get("function", call), "name")
    return message


def _begin(full: str, turn: int, prompt: str) -> tuple[int, int]:
    """Where an assistant turn begins: in the prompt that asks for it, and in the whole conversation.

    Both agree from the end of the last message before the turn up to there. The prompt may go on where history is
    written without it (`<think>` blocks), but then the turn's own text follows at once.
    """
    first = full.find(_OPEN + chr(_INDEX + turn))
    if first < 0:
        raise UnusableRow("the chat template leaves out an assistant turn")
    anchor = prompt.rfind(_CLOSE)
    found = full.rfind(prompt[anchor : anchor + 2], 0, first) if anchor >= 0 else -2
    if anchor >= 0 and found < 0:
        raise UnusableRow("the chat template leaves out the turn before an assistant turn")
    tail, piece = prompt[anchor + 2 if anchor >= 0 else 0 :], full[found + 2 : first]
    common = next((n for n, (a, b) in enumerate(zip(tail, piece, strict=False)) if a != b), min(len(tail), len(piece)))
    if common < min(len(tail), len(piece)):
        raise UnusableRow("the chat template writes a turn differently when it asks for it")
    return len(prompt) - len(tail) + common, found + 2 + common


class _Coder:
    """Tokenises rendered conversations of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: has no fast tokenizer (tokenizer.json), which labels need")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        self.added = {i for i, token in added.items() if token.content != unknown}  # that one any odd letter can become
        self.ending = {i for i, token in added.items() if token.special} | {tokenizer.eos_token_id}
        texts = sorted((t.content for t in added.values() if not t.content.isspace()), key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self.plain: Tokenizer | None = None

    def hide(self, value: Any) -> Any:
        """Break every control token spelled out in strings and keys by a mark after its first character."""
        if isinstance(value, str):
            return self.spelled.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def encode(self, marked: str, turns: list[int], unfinished: set[int]) -> Encoded:
        """Ids of a marked text, labelled from each BEGIN to the special token after its turn's last CLOSE."""
        parts: list[str] = []
        begins: list[int] = []
        breaks: list[int] = []
        regions: list[list[int]] = []
        closes: dict[str, int] = {}
        last = length = 0
        for match in _MARK.finditer(marked):
            parts.append(marked[last : match.start()])
            length += match.start() - last
            last = match.end()
            kind = match[0][0]
            if kind == _OPEN:
                regions.append([length, length])
            elif kind == _CLOSE:
                closes[match[1]] = length
                if regions:
                    regions[-1][1] = length
            else:
                (begins if kind == _BEGIN else breaks).append(length)
        text = "".join([*parts, marked[last:]])
        ids, ends, controls = self._tokenise(text, breaks, regions)
        labels = np.full(len(ids), IGNORED)
        starts = np.concatenate([[0], ends[:-1]])  # a token covers what follows the one before it, trimmed or not
        for turn, begin, limit in zip(turns, begins, [*begins[1:], len(text) + 1], strict=True):
            close = closes.get(chr(_INDEX + turn), -1)
            end = next((k for k in controls if ends[k] > close and ids[k] in self.ending), None)
            following = min((start for start, _ in regions if start >= max(close, begin)), default=limit)
            if close < begin or end is None or ends[end] > min(following, limit):
                raise UnusableRow("the chat template writes no special token after an assistant turn")
            first = max(np.searchsorted(starts, begin, "left"), np.searchsorted(ends, begin, "right"))
            last = end if turn in unfinished else end + 1
            labels[first:last] = ids[first:last]
        return Encoded(ids.tolist(), labels.tolist())

    def _tokenise(
        self, text: str, breaks: list[int], regions: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids, their ends in the text, and the places of the control tokens that the template wrote."""
        spelled = [match.span() for at in breaks if (match := self.spelled.match(text, at - 1))]
        borders = [0, *(at for span in spelled for at in span), len(text)]
        parts = [text[a:b] if n % 2 == 0 else _FILL * (b - a) for n, (a, b) in enumerate(pairwise(borders))]
        found = self.tokenizer("".join(parts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = np.array(found["input_ids"]), np.array(found["offset_mapping"]).reshape(-1, 2)
        controls = [k for k, token in enumerate(found["input_ids"]) if token in self.added]
        real = [
            k
            for k in controls
            if text[slice(*spans[k])].isspace()
            or not any(spans[k][0] < end and start < spans[k][1] for start, end in regions)
        ]
        if not spelled and len(real) == len(controls):
            return ids, np.maximum.accumulate(spans[:, 1]), controls
        return self._tokenise_apart(text, [(int(ids[k]), *spans[k].tolist()) for k in real])

    def _tokenise_apart(
        self, text: str, controls: list[tuple[int, int, int]]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The same for a text whose control tokens are known: (id, start, end); all others in it are plain text."""
        if self.plain is None:
            state = json.loads(self.tokenizer.backend_tokenizer.to_str())
            state |= {"added_tokens": [], "truncation": None, "padding": None}
            self.plain = Tokenizer.from_str(json.dumps(state))
            self.plain.add_special_tokens([AddedToken(_CONTROL, normalized=False, special=True)])
        pieces, last = [], 0
        for _, start, end in controls:
            pieces += [text[last:start], _CONTROL]
            last = end
        found = self.plain.encode("".join([*pieces, text[last:]]), add_special_tokens=False)
        ids: list[int] = []
        ends: list[int] = []
        places: list[int] = []
        shift, rest = 0, iter(controls)
        for token, (_, end) in zip(found.ids, found.offsets, strict=True):
            if token == self.plain.token_to_id(_CONTROL):
                token, _, here = next(rest)
                shift = here - end
                places.append(len(ids))
            elif token in self.added:
                raise UnusableRow("the tokenizer reads a control token even out of plain text")
            ids.append(token)
            ends.append(end + shift)
        return np.array(ids), np.maximum.accumulate(ends), places


@lru_cache(maxsize=4)
def _coder(tokenizer: PreTrainedTokenizerBase, size: int) -> _Coder:
    """One per tokenizer; its size tells whether tokens were added since."""
    return _Coder(tokenizer)
