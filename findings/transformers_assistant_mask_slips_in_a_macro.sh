#!/usr/bin/env bash
# transformers marks the wrong tokens as the assistant's where a template's `{% generation %}` stands in a macro.
#
# `apply_chat_template(..., return_assistant_tokens_mask=True)` finds what the assistant says by the length of what the
# template has put out until then. The output of a macro is put out when the macro ends, so that whatever the macro has
# written before `{% generation %}` is not counted: the marked stretch has the right length and begins that much too early.
# A loss on it learns a part of the header in place of the end of each answer. The same holds for a `{% set %}` block, a
# `{% call %}` and whatever is joined by `+`; in a `{% filter %}` or a recursive loop over all messages every mark goes to
# the beginning of the text. A macro that holds the answer alone is right. The rendered text is the same in all cases, and
# nothing warns.
# Seen 2026-11-29 with transformers 5.24.0, tokenizers 0.23.3 and jinja2 3.1.6, two turns each; what the mask covers:
#     `{% generation %}` in the loop over messages:       Good day, See you soon
#     in a macro of the answer alone:                     Good day, See you soon
#     in a macro or `set` block with the header, or in +: <assista, <assistant>S
#     in a `call` block that adds a bracket:              [<assist, [<assistant>
#     in a `filter` or a recursive loop around all:       <user>Hi the
# What helps: `{% generation %}` at the template's outer level, or the mask compared with the text once for each template.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
letters = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)  # a token for each character
turns = [("user", "Hi there"), ("assistant", "Good day"), ("user", "Bye"), ("assistant", "See you soon")]
chat = [{"role": role, "content": content} for role, content in turns]

answer = "{% generation %}{{ m.content }}{% endgeneration %}"
turn = "<{{ m.role }}>{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}</>"
loop, end = "{% for m in messages %}", "{% endfor %}"
say = "{% macro say(m) %}" + answer + "{% endmacro %}"
said = "(say(m) if m.role == 'assistant' else m.content)"
wrap = "{% macro wrap() %}[{{ caller() }}]{% endmacro %}"
templates = {
    "plain": loop + turn + end,
    "macro of the answer": say + loop + "<{{ m.role }}>{{ " + said + " }}</>" + end,
    "macro of the turn": "{% macro say(m) %}" + turn + "{% endmacro %}" + loop + "{{ say(m) }}" + end,
    "set": loop + "{% set text %}" + turn + "{% endset %}{{ text }}" + end,
    "joined by +": say + loop + "{{ '<' + m.role + '>' + " + said + " + '</>' }}" + end,
    "call": wrap + loop + "{% call wrap() %}" + turn + "{% endcall %}" + end,
    "filter": "{% filter trim %}" + loop + turn + end + "{% endfilter %}",
    "recursive loop": "{% for m in messages recursive %}" + turn + end,
}


def covered(name):
    """The text of each stretch of marked tokens; stretches that touch are one."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    output = tokenizer.apply_chat_template(chat, chat_template=templates[name], **options)
    text = tokenizer.decode(output["input_ids"])
    assert text.replace("[", "").replace("]", "") == "".join(f"<{role}>{content}</>" for role, content in turns)
    marked = "".join(letter if mark else "\0" for letter, mark in zip(text, output["assistant_masks"], strict=True))
    found = [stretch for stretch in marked.split("\0") if stretch]
    print(f"{name:20}", *map(repr, found))
    return found


found = {name: covered(name) for name in templates}
wanted = {name: ["<assista", "<assistant>S"] for name in ("macro of the turn", "set", "joined by +")}
wanted |= {name: ["Good day", "See you soon"] for name in ("plain", "macro of the answer")}
wanted |= {name: ["<user>Hi the"] for name in ("filter", "recursive loop")} | {"call": ["[<assist", "[<assistant>"]}
sys.exit(0 if found == wanted else "this has changed")
PY
