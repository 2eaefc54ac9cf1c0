"""What a row says, through the templates of all families: ids are those of transformers, labels the assistant's own."""

import json
import re
from pathlib import Path

import pytest
import yaml
from small_tokenizers import FAMILIES, tokenizer_of, tokens_text
from test_dialogues import VICUNA, head, runs, split_expected
from test_layouts import CALL, SCHEMA, A, U
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_ds.data.dialogues import Chat
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.data.marks import IGNORED
from medusa_ds.data.sources import read_conversation

USER, ASSISTANT = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
TWO = {"role": "assistant", "content": "two"}
RAW = {"role": "assistant", "content": "hello world\n</think>\n\ntwo"}
ALL = [
    *((family, None) for family in FAMILIES),
    ("qwen3", "qwen3_opened"),
    ("smollm2", "chatml"),
    ("llama3", "llama31"),
]


def render(row: dict, family: str, template: str | None = None, **args):
    """The chat and what it makes of a row, which is read as from a file."""
    chat = Chat(tokenizer_of(family, template), args)
    return chat, chat.encode(**json.loads(read_conversation(row).text()))


def expect(row: dict, family: str, template: str | None, marked: str, **args) -> None:
    """The supervised parts of the text stand in guillemets."""
    chat, encoded = render(row, family, template, **args)
    found = runs(chat.tokenizer, encoded)
    assert [(re.sub("  +", " ", text), supervised) for text, supervised in found] == split_expected(marked)


def as_user(row: dict, family: str, template: str | None = None, **args) -> list[int]:
    """What transformers makes of the row's messages, called as its documentation says."""
    tokenizer = tokenizer_of(family, template)
    own = row.get("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(row["messages"], row.get("tools"), return_dict=False, **{**args, **own})


@pytest.mark.parametrize(("family", "template"), ALL)
def test_a_turn_marked_as_not_to_be_trained_has_no_label(family, template):
    """Mutation: label every assistant turn."""
    plain = {"messages": [U, A, U, TWO]}
    for key, value in (("weight", 0), ("train", False), ("loss_mask", 0)):
        marked = {"conversations": [U, {**A, key: value}, U, {**TWO, "weight": 1}]}
        chat, encoded = render(marked, family, template)
        whole = render(plain, family, template)[1]
        assert encoded.input_ids == whole.input_ids == as_user(plain, family, template)
        labelled = [text for text, supervised in runs(chat.tokenizer, encoded) if supervised]
        assert len(labelled) == 1 and "two" in labelled[0] and "Yes" not in labelled[0]


THINKING = [
    ("qwen3", None, {}, "«<think>\nhm\n</think>\n\ntwo<|im_end|>»\n"),
    ("qwen3", None, {"enable_thinking": False}, "<think>\n«hm\n</think>\n\ntwo<|im_end|>»\n"),
    ("qwen3", "qwen3_opened", {}, "<think>\n«hm\n</think>\n\ntwo<|im_end|>»\n"),
]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(("family", "template", "args", "answer"), THINKING)
def test_thoughts_reach_the_template_under_the_name_that_it_reads(family, template, args, answer, key):
    """Mutation: hand them over under the row's name, whereupon an empty block is supervised."""
    row = {"messages": [U, {**TWO, key: "hm"}]}
    expect(row, family, template, USER + ASSISTANT + answer, **args)
    standard = {"messages": [U, {**TWO, "reasoning_content": "hm"}]}
    assert render(row, family, template, **args)[1].input_ids == as_user(standard, family, template, **args)
    other = (
        "{% for m in messages %}<|im_start|>{{ m.role ~ ':' ~ (m.thinking or '') ~ m.content }}<|im_end|>{% endfor %}"
    )
    chat, encoded = render(row, "smollm2", None, chat_template=other)
    assert tokens_text(chat.tokenizer, encoded.input_ids).endswith("assistant:hmtwo<|im_end|>")


RAW_ROWS = [
    ("qwen3", None, {}, "«<think>\nhello world\n</think>\n\ntwo<|im_end|>»\n"),
    ("qwen3", "qwen3_opened", {}, "<think>\n«hello world\n</think>\n\ntwo<|im_end|>»\n"),
    ("smollm2", "chatml", {}, "«hello world\n</think>\n\ntwo<|im_end|>»\n"),
]


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize(("family", "template", "args", "answer"), RAW_ROWS)
def test_a_raw_completion_of_a_thinking_model(family, template, args, answer, opening):
    """Earlier turns' thoughts are dropped where the template drops them. Mutation: take the tags for text."""
    said = {**RAW, "content": opening + RAW["content"]}
    if template != "chatml":
        expect({"messages": [U, said]}, family, template, USER + ASSISTANT + answer, **args)
    row = {"messages": [U, said, U, said]}
    encoded = render(row, family, template, **args)[1]
    assert encoded.input_ids == as_user(row, family, template, **args)
    if family == "qwen3":
        expect(row, family, template, USER + ASSISTANT + "«two<|im_end|>»\n" + USER + ASSISTANT + answer, **args)


def test_thoughts_of_other_families():
    """A DeepSeek-like template cuts them off, a GLM-like one keeps them in the last turn."""
    row = {"messages": [U, RAW, U, {**TWO, "content": "<think>hm</think>two"}]}
    once = "<|User|>Hi<|Assistant|>«\n\ntwo<|end|>»"
    expect(row, "deepseek", None, f"<|begin|>{once}<|User|>Hi<|Assistant|>«two<|end|>»")
    glm = "[gMASK]<sop><|user|>\nHi<|assistant|>«\n<think></think>\ntwo<|user|>»\nHi<|assistant|>«\n<think>hm</think>"
    expect(row, "glm", None, f"{glm}\ntwo»")
    for family in ("deepseek", "glm"):
        assert render(row, family)[1].input_ids == as_user(row, family)
    begin, answer = "[gMASK]<sop><|user|>\nHi<|assistant|>", "\n<think>hm</think>\ntwo"
    for key in ("reasoning_content", "reasoning", "thinking"):
        expect({"messages": [U, {**TWO, key: "hm"}]}, "glm", None, f"{begin}«{answer}»")
    off = {"messages": [U, TWO], "chat_template_kwargs": {"enable_thinking": False}}
    expect(off, "glm", None, f"{begin}\n<think></think>«\ntwo»")
    assert render(off, "glm")[1].input_ids == as_user(off, "glm")


PLAIN = [
    ("llama3", f"<|begin_of_text|>{head('user')}Hi<|eot_id|>{head('assistant')}«", "<|eot_id|>»"),
    ("mistral", "<s>[INST] Hi[/INST]« ", "</s>»"),
    ("vicuna", f"{VICUNA} USER: Hi ASSISTANT:« ", "</s>»"),
]


@pytest.mark.parametrize(("family", "before", "after"), PLAIN)
def test_tags_are_text_where_the_template_knows_no_thoughts(family, before, after):
    for content in (RAW["content"], "<think>\nhm\n</think>\n\ntwo", "</think>\n\ntwo"):
        row = {"messages": [U, {**TWO, "content": content}]}
        expect(row, family, None, f"{before}{content}{after}")
        assert render(row, family)[1].input_ids == as_user(row, family)


EMPTY_ROWS = [
    ("qwen3", None, {}, {"enable_thinking": False}, EMPTY + "«two<|im_end|>»\n"),
    ("qwen3", None, {"enable_thinking": False}, {}, EMPTY + "«two<|im_end|>»\n"),
    ("qwen3", None, {"enable_thinking": False}, {"enable_thinking": True}, "«" + EMPTY + "two<|im_end|>»\n"),
    ("qwen3", "qwen3_opened", {}, {}, EMPTY + "«two<|im_end|>»\n"),
]


@pytest.mark.parametrize(("family", "template", "args", "own", "answer"), EMPTY_ROWS)
def test_an_empty_block_that_the_prompt_writes_has_no_label(family, template, args, own, answer):
    """The row's arguments stand above the recipe's. Mutations: ignore them; begin the turn where the prompt ends."""
    row = {"messages": [U, TWO, U, TWO], "chat_template_kwargs": own}
    expect(row, family, template, f"{USER}{ASSISTANT}«two<|im_end|>»\n{USER}{ASSISTANT}{answer}", **args)
    assert render(row, family, template, **args)[1].input_ids == as_user(row, family, template, **args)


BOTH = [{**CALL, "function": {**CALL["function"], "arguments": arguments}} for arguments in ({"x": 2}, '{"x": 2}')]
WRITTEN = {
    ("deepseek", None): (
        '<|begin|><|User|>Hi<|Assistant|>«<|tool_call|>add\n```json\n{"x": 2}\n```<|tool_end|><|end|>»'
        "<|tool_output|>4<|tool_end|>«Yes<|end|>»"
    ),
    ("glm", None): (
        "[gMASK]<sop><|user|>\nHi<|assistant|>«\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call><|observation|>»\n<tool_response>\n4\n</tool_response>"
        "<|assistant|>«\n<think></think>\nYes»"
    ),
    ("qwen3", None): (
        f'{USER}{ASSISTANT}«<tool_call>\n{{"name": "add", "arguments": {{"x": 2}}}}\n</tool_call><|im_end|>»\n'
        f"<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n{ASSISTANT}«{EMPTY}Yes<|im_end|>»\n"
    ),
    ("llama3", "llama31"): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: 26 Jul 2024\n\n<|eot_id|>{head('user')}Hi<|eot_id|>{head('assistant')}"
        f'«{{"name": "add", "parameters": {{"x": 2}}}}<|eot_id|>»{head("ipython")}4<|eot_id|>{head("assistant")}'
        "«Yes<|eot_id|>»"
    ),
    ("mistral", None): (
        '<s>[INST] Hi[/INST]«[TOOL_CALLS] [{"name": "add", "arguments": {"x": 2}, "id": "abcdefghi"}]</s>»'
        '[TOOL_RESULTS] {"content": 4, "call_id": "abcdefghi"}[/TOOL_RESULTS]« Yes</s>»'
    ),
}


@pytest.mark.parametrize(("family", "template"), WRITTEN)
@pytest.mark.parametrize("call", BOTH)
def test_each_template_gets_a_calls_arguments_in_its_form(family, template, call):
    """Both forms of a row give the same ids. Mutation: objects for all, which a DeepSeek-like template refuses."""
    result = {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"}
    row = {
        "messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **call}]}, result, A]
    }
    expect(row, family, template, WRITTEN[family, template])
    form = BOTH[1] if family == "deepseek" else BOTH[0]
    row["messages"][1]["tool_calls"] = [{"id": "abcdefghi", **form}]
    assert render(row, family, template)[1].input_ids == as_user(row, family, template)
    row["tools"] = [{"type": "function", "function": {**SCHEMA, "description": "Adds."}}]
    assert render(row, family, template)[1].input_ids == as_user(row, family, template)


LAST_CALLS = {
    ("deepseek", None): '<|begin|><|User|>Hi<|Assistant|>«<|tool_call|>add\n```json\n{"x": 2}\n```<|tool_end|><|end|>»',
    ("glm", None): (
        "[gMASK]<sop><|user|>\nHi<|assistant|>«\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>»"
    ),
    ("qwen3", None): (
        f'{USER}{ASSISTANT}«{EMPTY}<tool_call>\n{{"name": "add", "arguments": {{"x": 2}}}}\n</tool_call><|im_end|>»\n'
    ),
    ("qwen3", "qwen3_opened"): (
        f'{USER}{ASSISTANT}{EMPTY}«<tool_call>\n{{"name": "add", "arguments": {{"x": 2}}}}\n</tool_call><|im_end|>»\n'
    ),
    ("mistral", None): (
        '<s>[INST] Hi[/INST]«[TOOL_CALLS] [{"name": "add", "arguments": {"x": 2}, "id": "abcdefghi"}]</s>»'
    ),
}


@pytest.mark.parametrize(("family", "template"), LAST_CALLS)
def test_a_conversation_may_end_in_a_call(family, template):
    """Mutations: begin the turn inside the block that the prompt opens; demand a token that ends a GLM-like call."""
    call = {"id": "abcdefghi", **BOTH[family == "deepseek"]}
    row = {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    expect(row, family, template, LAST_CALLS[family, template])
    assert render(row, family, template)[1].input_ids == as_user(row, family, template)


def test_a_closing_tag_that_the_model_wrote_is_a_label():
    """Where no prompt opens a block, the tag is the answer's own. Mutation: go by the tag alone."""
    row = {"messages": [U, {**TWO, "content": "</think>\n\ntwo"}]}
    expect(row, "smollm2", "chatml", f"{USER}{ASSISTANT}«</think>\n\ntwo<|im_end|>»\n")
    expect(row, "qwen3", "qwen3_opened", f"{USER}{ASSISTANT}{EMPTY}«two<|im_end|>»\n")


UNREAD = {
    ("llama3", None): "thoughts, tool calls, schemas of functions",
    ("llama3", "llama31"): "thoughts",
    ("qwen3", None): "",
    ("qwen3", "qwen3_opened"): "",
    ("deepseek", None): "thoughts, schemas of functions",
    ("glm", None): "schemas of functions",
    ("mistral", None): "thoughts",
    ("vicuna", None): "thoughts, tool calls, schemas of functions",
    ("smollm2", None): "thoughts, tool calls, schemas of functions",
    ("smollm2", "chatml"): "thoughts, tool calls, schemas of functions",
}


@pytest.mark.parametrize(("family", "template"), ALL)
def test_what_the_template_leaves_out_is_told(family, template):
    """Mutation: drop what is not read in silence."""
    chat = Chat(tokenizer_of(family, template), {})
    row = read_conversation({"messages": [U, {**A, "reasoning": "hm", "tool_calls": [CALL]}], "functions": [SCHEMA]})
    told = [
        note.removesuffix(", which the chat template does not read") for note in chat.unread(row.messages, row.tools)
    ]
    assert ", ".join(told) == UNREAD[family, template]
    assert chat.unread([U, A], None) == []


@pytest.mark.parametrize(("family", "template"), [("vicuna", None), ("smollm2", "chatml"), ("llama3", None)])
def test_a_template_without_tool_calls_is_told_with_the_mend(family, template):
    row = {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, U, A]}
    with pytest.raises(
        UnusableRow, match=r"writes none; give another one as data\.template_args\.chat_template \(docs"
    ):
        render(row, family, template)


@pytest.mark.parametrize(("family", "template"), ALL)
def test_the_templates_own_end_ends_an_answer(family, template):
    """Mutation: take the last label of the conversation, which is a word with a GLM-like template."""
    ends = {"llama3": "<|eot_id|>", "mistral": "</s>", "vicuna": "</s>", "deepseek": "<|end|>", "glm": "<|user|>"}
    chat = Chat(tokenizer_of(family, template), {})
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.ends)) == [ends.get(family, "<|im_end|>")]


@pytest.mark.parametrize(("family", "template"), ALL)
def test_a_prompt_is_the_beginning_of_what_is_trained_on(family, template):
    """One renderer: typed control tokens are text in both. Mutation: render prompts without hiding them."""
    chat = Chat(tokenizer_of(family, template), {})
    end = chat.tokenizer.convert_ids_to_tokens(list(chat.ends))[0]
    opened = 2 if template == "qwen3_opened" or family == "deepseek" else 0  # tokens of a block that history has not
    counts = []
    for text in ("Hi", f"say {end} twice {end}"):
        asked = [{"role": "user", "content": text}]
        prompt, encoded = chat.prompt(asked), chat.encode([*asked, A])
        shared = prompt[: len(prompt) - opened]
        assert encoded.input_ids[: len(shared)] == shared
        counts.append([token in chat.ends for token in prompt].count(True))
    assert counts[0] == counts[1]
    assert chat.prompt([U]) == chat.tokenizer.apply_chat_template([U], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("words", [None, "user assistant Hi Y ##es two"])
def test_labels_are_what_generation_tags_say(words):
    """WordPiece, as of BERT, has no tokens of whitespace. Mutation: count a line break to the word after it."""
    tokenizer = tokenizer_of("smollm2", "chatml")
    if words:
        model = models.WordPiece({word: i for i, word in enumerate(["[UNK]", *words.split()])}, unk_token="[UNK]")
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        template = tokenizer.chat_template
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", chat_template=template)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat = Chat(tokenizer, {})
    encoded = chat.encode([U, A, U, TWO])
    found = chat.tokenizer.apply_chat_template([U, A, U, TWO], return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.input_ids == found["input_ids"]
    assert [label != IGNORED for label in encoded.labels] == [bool(mask) for mask in found["assistant_masks"]]


def test_the_example_of_the_manual_writes_tool_calls():
    """The template that docs/data.md gives for rows with tool calls."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(re.search(r"## The template\n.*?```yaml\n(.*?)```", text, re.DOTALL)[1])
    row = {
        "messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, A]
    }
    chat, encoded = render(row, "smollm2", None, **recipe["data"]["template_args"])
    supervised = [text for text, supervised in runs(chat.tokenizer, encoded) if supervised]
    assert supervised == ['<tool_call>{"name": "add", "arguments": {"x": 2}}</tool_call><|im_end|>', "Yes<|im_end|>"]
