#!/usr/bin/env bash
# An RWKV model that transformers saves after an evaluation is another model: deep layers' weights are halved.
#
# Against overflow in fp16, RWKV halves its hidden states every six layers where it does not train, and the forward pass
# divides the output weights of the layers to match, in place. `save_pretrained` and `state_dict` take them as they are at
# that moment, and nothing in the files says so: loaded, the model divides them again. A loop that evaluates and then
# saves loses a factor of 2 in layers 7 to 12, of 4 in layers 13 to 18, and so on, each time that it is loaded, evaluated
# and saved; `model.train()` before saving does not undo it, only a forward pass in training does.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU, 8 layers, random weights: largest difference of the
# logits after loading, and an output weight of the last layer as a part of what it was:
#     saved before any forward pass:            0.000, 1
#     after one in eval():                      1.027, 0.5
#     after one in eval(), then train():        1.027, 0.5
#     after one in eval() and one in train():   0.000, 1
#     loaded, evaluated and saved three times:  1.845, 0.125
#     after one in eval(), rescale_every=0:     0.000, 1
# What helps: `rescale_every=0` in the config, unless the model runs in fp16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
export HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"$work/venv/bin/python" - "$work/model" <<'PY'
import sys

import torch
from transformers import RwkvConfig, RwkvForCausalLM

ids = torch.randint(1, 999, (1, 20), generator=torch.Generator().manual_seed(0))


def built(rescale_every=6):
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 8, "context_length": 128}
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=rescale_every))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif "time" in name:
            torch.nn.init.uniform_(weight)
    return model


@torch.no_grad()
def passed(model, train):
    return model.train(train)(ids, use_cache=False).logits


def loaded(model):
    model.save_pretrained(sys.argv[1])
    return RwkvForCausalLM.from_pretrained(sys.argv[1])


def weight(model):
    return model.rwkv.blocks[7].attention.output.weight[0, 0].item()


wanted, first = passed(built(), False), weight(built())


def told(name, model):
    part = weight(model) / first
    difference = float((passed(model, False) - wanted).abs().max())
    print(f"{name:42} {difference:.3f}, {part:g}")
    return difference, part


fresh = told("saved before any forward pass", loaded(built()))
model = built()
passed(model, False)
evaluated = told("after one in eval()", loaded(model))
model.train()
switched = told("after one in eval(), then train()", loaded(model))
passed(model, True)
trained = told("after one in eval() and one in train()", loaded(model))
model = built()
for _ in range(3):
    passed(model, False)
    model = loaded(model)
thrice = told("loaded, evaluated and saved three times", model)
model = built(0)
passed(model, False)
plain = told("after one in eval(), rescale_every=0", loaded(model))
right = all(difference < 1e-4 and part == 1 for difference, part in (fresh, trained, plain))
wrong = all(difference > 0.5 for difference, _ in (evaluated, switched, thrice))
sys.exit(0 if right and wrong and (evaluated[1], switched[1], thrice[1]) == (0.5, 0.5, 0.125) else "this has changed")
PY
