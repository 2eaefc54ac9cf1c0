"""Labels by the chat template: the assistant's turns and the token that ends each, and nothing else."""

import re
from itertools import pairwise

import pytest
from small_tokenizers import ADDED, FAMILIES, SPECIAL, tokenizer_of, tokens_text

from medusa_ds.data.dialogues import Chat, describe
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.data.marks import Encoded
from medusa_ds.errors import UserError

LLAMA31 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
VICUNA = (
    "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def chat(*turns: str) -> list[dict]:
    """`s: text`, `u: text`, `a: text`, `t: text`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def encode(messages, tokenizer, args, tools=None) -> Encoded:
    """Ids and labels of messages in the normal form."""
    return Chat(tokenizer, args).encode(messages, tools)


def head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def split_expected(marked: str) -> list[tuple[str, bool]]:
    """Pieces of a text whose supervised parts stand in guillemets."""
    return [(part, bool(i % 2)) for i, part in enumerate(re.split("[«»]", marked)) if part]


def runs(tokenizer, encoded: Encoded) -> list[tuple[str, bool]]:
    out: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if not out or out[-1][1] != (label != -100):
            out.append(([], label != -100))
        out[-1][0].append(token)
    return [(tokens_text(tokenizer, ids), supervised) for ids, supervised in out]


TWO = chat("u: Hi", "a: Hi", "u: Hi", "a: Hi")
BRIEF = chat("s: Be brief.", "u: Hi", "a: Hi there")
CASES = [
    (
        ("llama3",),
        TWO,
        f"<|begin_of_text|>{head('user')}Hi<|eot_id|>{head('assistant')}«Hi<|eot_id|>»"
        f"{head('user')}Hi<|eot_id|>{head('assistant')}«Hi<|eot_id|>»",
    ),
    (
        ("llama3",),
        chat("s: Be brief. ", "u:  Hi\n", "a: \n Hi there \n"),
        f"<|begin_of_text|>{head('system')}Be brief.<|eot_id|>{head('user')}Hi<|eot_id|>"
        f"{head('assistant')}«Hi there<|eot_id|>»",
    ),
    (
        ("llama3", "llama31"),
        BRIEF,
        f"{LLAMA31}Be brief.<|eot_id|>{head('user')}Hi<|eot_id|>{head('assistant')}«Hi there<|eot_id|>»",
    ),
    (
        ("qwen3",),
        TWO,  # thinking on: the model itself writes the empty thought of the last turn
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hi<|im_end|>»\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nHi<|im_end|>»\n",
    ),
    (("mistral",), TWO, "<s>[INST] Hi[/INST]« Hi</s>»[INST] Hi[/INST]« Hi</s>»"),
    (
        ("mistral",),
        [*BRIEF, *chat("u: Hi", "a: Hi")],  # the system turn stands where the last prompt has it
        "<s>[INST] Hi[/INST]« Hi there</s>»[INST] Be brief.\n\nHi[/INST]« Hi</s>»",
    ),
    (("vicuna",), TWO, f"{VICUNA} USER: Hi ASSISTANT:« Hi</s>» USER: Hi ASSISTANT:« Hi</s>»"),
    (("vicuna",), BRIEF, "<s> Be brief. USER: Hi ASSISTANT:« Hi there</s>»"),
    (
        ("smollm2",),
        TWO,
        f"{SMOL}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hi<|im_end|>»\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hi<|im_end|>»\n",
    ),
    (
        ("smollm2",),
        chat("s: Be brief.", "u: Hi ", "a: Hi\n", "u: Hi"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
        "«Hi\n<|im_end|>»\n<|im_start|>user\nHi<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(("family", "messages", "expected"), CASES)
def test_labels_are_the_assistants_turns_and_their_ends(family, messages, expected):
    """Mutations: label the last user turn; begin a turn one token earlier; stop before the token that ends it."""
    tokenizer = tokenizer_of(*family)
    found = runs(tokenizer, encode(messages, tokenizer, {}))
    if family[0] in ("mistral", "vicuna"):
        # sentencepiece puts a space before a text that follows a control token; the templates' own come on top
        found = [(text.replace("  ", " "), supervised) for text, supervised in found]
    assert found == split_expected(expected)


ORDINARY = [
    TWO,
    BRIEF,
    chat("u: Hi\n\n", "a: \n\nHi"),
    chat("u:  two\n\n\n", "a:   four \n\n "),
    chat("u: é 中\n😀", "a: 😀é"),
    chat("u: cafe\u0301", "a: cafe\u0301"),
    chat("s:  Be brief.\n", "u: \n?", "a: 'll\n\n\n!", "u: \tx ", "a:  1234 5"),
    chat("u: x", "a: . "),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_an_unfinished_turn_has_no_label(family):
    """Red when an answer that was cut off teaches the heads that it ended there."""
    tokenizer, cut = tokenizer_of(family), chat("u: Hi", "a: Hi there", "u: Hi", "a: Hi")
    whole = encode(cut, tokenizer, {})
    cut[1]["unfinished"] = True
    found = encode(cut, tokenizer, {})
    assert found.input_ids == whole.input_ids
    differ = [k for k, (a, b) in enumerate(zip(found.labels, whole.labels, strict=True)) if a != b]
    first_end = next(k for k, (a, b) in enumerate(pairwise(whole.labels)) if a != -100 and b == -100)
    assert differ == [first_end]
    assert found.labels[first_end] == -100


@pytest.mark.parametrize("messages", ORDINARY)
@pytest.mark.parametrize(("family", "args"), [(f, {}) for f in FAMILIES] + [("qwen3", {"enable_thinking": False})])
def test_ids_are_those_of_apply_chat_template(family, args, messages):
    """Mutation: tokenise prompt and answer apart."""
    tokenizer = tokenizer_of(family)
    if family == "mistral" and messages[0]["role"] == "system":
        pytest.skip("the template leaves the system turn out of a whole conversation")
    expected = tokenizer.apply_chat_template(messages, return_dict=False, **args)
    encoded = encode(messages, tokenizer, args)
    assert encoded.input_ids == expected
    assert sum(label != -100 for label in encoded.labels) >= 2 * sum(m["role"] == "assistant" for m in messages)


SPELLED = [(family, text) for family in FAMILIES for text in SPECIAL[family] + ADDED.get(family, [])]


@pytest.mark.parametrize(("family", "spelled"), SPELLED)
@pytest.mark.parametrize("place", ["system", "user", "assistant", "tool", "arguments", "schema"])
def test_control_tokens_in_messages_stay_text(family, spelled, place):
    """The ids hold the control tokens of the same conversation without it, and its text, and are otherwise the same.

    Mutation: hide nothing from the template.
    """
    if place in ("tool", "arguments", "schema") and family in ("vicuna", "smollm2"):
        pytest.skip("the family's template knows no tools")
    if place == "schema" and family in ("deepseek", "glm"):
        pytest.skip("the family's template writes no schemas")
    template = "llama31" if family == "llama3" and place in ("tool", "arguments", "schema") else None
    tokenizer = tokenizer_of(family, template)

    def conversation(word: str) -> tuple[list[dict], list[dict] | None]:
        said = {place: f"say {word}{word} now {word}"}
        messages = chat(f"s: {said.get('system', 'Be brief.')}", f"u: {said.get('user', 'Hi')}")
        tools = None
        if place in ("tool", "arguments"):
            call = {**CALL, "function": {"name": "add", "arguments": {said.get("arguments", "x"): word}}}
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": [call if place == "arguments" else CALL]}
            )
            messages.append({"role": "tool", "content": said.get("tool", "4"), "tool_call_id": "abcdefghi"})
        if place == "schema":
            tools = [{"type": "function", "function": {**TOOLS[0]["function"], "description": said["schema"]}}]
        return [*messages, *chat(f"a: {said.get('assistant', 'Hi')}")], tools

    added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    plain, tools = conversation("word")
    expected = [token for token in encode(plain, tokenizer, {}, tools).input_ids if token in added]
    messages, tools = conversation(spelled)
    encoded = encode(messages, tokenizer, {}, tools)
    assert [token for token in encoded.input_ids if token in added] == expected
    said = f"say {spelled}{spelled} now {spelled}"
    assert said in tokens_text(tokenizer, encoded.input_ids)
    supervised = "".join(text for text, supervised in runs(tokenizer, encoded) if supervised)
    assert (said in supervised) == (place in ("assistant", "arguments"))


def test_spelled_control_tokens_leave_the_rest_as_it_is():
    """Around a spelled token the ids are those of the text in which it is no token."""
    tokenizer, other = tokenizer_of("llama3"), tokenizer_of("llama3")
    encoded = encode(chat("u: two <|end_of_text|> four", "a: Hi"), tokenizer, {})
    other = type(other)(
        tokenizer_object=type(other.backend_tokenizer).from_str(
            other.backend_tokenizer.to_str().replace("<|end_of_text|>", "<|not_it|>")
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=other.chat_template,
    )
    assert encoded.input_ids == other.apply_chat_template(
        chat("u: two <|end_of_text|> four", "a: Hi"), return_dict=False
    )


def test_a_control_token_split_over_two_messages_stays_text():
    """Mutation: trust whatever the tokenizer finds where no token was spelled out."""
    tokenizer = tokenizer_of("smollm2")
    template = CHATML.replace("<|im_start|>{{ m.role }}\n", "{% if m.role != 'user' %}<|im_start|>{% endif %}")
    template = template.replace("<|im_end|>\n", "{% if m.role == 'assistant' %}<|im_end|>{% endif %}")
    encoded = encode(chat("s: <|im_", "u: end|>", "a: Hi"), tokenizer, {"chat_template": template})
    assert tokens_text(tokenizer, encoded.input_ids) == "<|im_start|><|im_end|><|im_start|>Hi<|im_end|>"
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1


def test_a_letter_of_several_tokens_before_a_turn_is_not_labelled():
    """Mutation: go by the tokens' offsets alone, which all tokens of a letter share."""
    tokenizer = tokenizer_of("smollm2")
    template = CHATML.replace("\n{{", "😀{{") + "{% if add_generation_prompt %}<|im_start|>assistant😀{% endif %}"
    encoded = encode(chat("u: Hi", "a: Hi"), tokenizer, {"chat_template": template})
    assert runs(tokenizer, encoded)[1] == ("Hi<|im_end|>", True)


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("smollm2", chat("u: Hi"), "no assistant turn"),
        ("smollm2", [], "no assistant turn"),
        ("smollm2", TWO * 251, "more than 1000 messages"),
        ("smollm2", chat("a: Hi", "u: Hi", "a: Hi"), "begins with an assistant turn"),
        ("smollm2", [{"role": "narrator", "content": "x"}, *TWO], "unknown role"),
        ("smollm2", chat("u: \U0010fff1", "a: Hi"), "private-use"),
        ("mistral", chat("u: Hi", "u: Hi", "a: Hi"), "refuses it: After the optional system message"),
        ("vicuna", chat("u: Hi", "u: Hi", "a: Hi"), "refuses it: roles must alternate"),
        ("llama3", [{"role": "user"}, {"role": "assistant", "content": ["x"]}], "the chat template"),
        ("llama3", chat("u: Hi", "a:  "), "leaves out an assistant turn"),
    ],
)
def test_unusable_rows_have_a_reason(family, messages, reason):
    with pytest.raises(UnusableRow, match=re.escape(reason)):
        encode(messages, tokenizer_of(family), {})


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML.replace("<|im_end|>", "<end>"), "no special token after an assistant turn"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}"), "alters a message's text"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out an assistant turn"),
        (CHATML + "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}", "writes a turn differently"),
        ("<|im_start|><|im_start|>" + CHATML, "BOS twice"),
        ("{% for", "refuses it"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(template, found):
    with pytest.raises(UserError, match=rf"test/smollm2: its chat template.*{found}.*data.template_args.chat_template"):
        Chat(tokenizer_of("smollm2"), {"chat_template": template}).check()


def test_a_tokenizer_without_a_template():
    tokenizer = tokenizer_of("vicuna")
    tokenizer.chat_template = None
    tokenizer.name_or_path = "someone/base-7b"
    with pytest.raises(UserError, match="someone/base-7b: its tokenizer has no chat template"):
        encode(TWO, tokenizer, {})
    given = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    assert encode(TWO, tokenizer, {"chat_template": given}).input_ids[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = {"chat": given, "rag": "{{ 'x' }}"}
    with pytest.raises(UserError, match="several of which none is called default; choose"):
        encode(TWO, tokenizer, {})


def test_describe_colours_what_is_supervised():
    tokenizer = tokenizer_of("smollm2")
    text = describe(encode(chat("u: Hi", "a: Hi"), tokenizer, {}), tokenizer)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\x1b[32mHi<|im_end|>\x1b[0m\n")
