"""Every causal family of the installed transformers against it: `python tests/families.py [FAMILY ...]`.

Each is built small from its own config class with random weights, as `model.facts` does to ask it. Four answers, each
right, or refused with the sentence that a user reads; anything else ends the command with status 1:

A  loss of the LM head in stage 2, against the cross-entropy of the model's own logits
B  logits of documents that share a sequence, against each alone
C  greedy text with heads, against `generate`
D  greedy text without heads, against `generate`

Without families it goes through all of them and writes docs/families.md, but for what stands there of other versions.
"""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medusa_ds.config.recipe import LossSpec, ModelSpec
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.trees import chain, default_tree
from medusa_ds.errors import UserError
from medusa_ds.heads.joint import JointModel
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.backbone import load_config, vocabulary_projection
from medusa_ds.model.facts import Asked, build_twin, find_facts

RIGHT, NUM, NEW = "right", 2, 14
OTHERS = "\n## Other versions"
SECONDS = 240  # of the processor, most for one family
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_method": "greedy", "moe_intermediate_size": 1408},
    "exaone4": {"max_position_embeddings": 131072},  # of the published ones, which cross their windows
    "exaone_moe": {"max_position_embeddings": 262144},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_head": 64, "mamba_n_heads": 24, "mamba_d_ssm": 1536},
    "granite": {"logits_scaling": 8.0},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "llama/dynamic": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "llama/longrope": {
        "rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        "max_position_embeddings": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
    },
    "olmo3": {"max_position_embeddings": 65536},
    "qwen3/windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
"""Fields that a family's bare config lacks, or in which it shows what families are known for."""


def answers(name: str) -> list[str]:
    """A to D of a family, or of one of its variants."""
    config = {"model_type": name.split("/")[0], **VARIANTS.get(name, {})}
    try:
        who = Asked(load_config(ModelSpec(name=name, init="random", config=config)))
        facts = find_facts(who)
    except UserError as error:
        return [str(error)] * 4
    model = build_twin(who)
    packed = _documents(model) if facts.packing is None else f"not packed: {facts.packing}"
    texts = _texts(model)
    return [_loss(model), packed, *texts]  # the loss comes last: it puts another LM head into the model


def _verdict(right: bool) -> str:
    return RIGHT if right else "wrong"


def _heads(model: Any) -> MedusaHeads:
    lm_head = model.get_output_embeddings()
    logits = vocabulary_projection(model).logits
    heads = MedusaHeads(NUM, 1, lm_head.in_features, lm_head.out_features, logits=logits)
    heads.initialize(lm_head.weight, lm_head.bias)
    torch.nn.init.normal_(heads[0].blocks[0].weight, std=0.1)
    return heads


def _loss(model: Any) -> str:
    ids = torch.randint(1, 80, (2, 13), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        # not `labels=`: the decoders of translators expect labels that are shifted already
        logits = model(input_ids=ids, use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        joint = JointModel(model, _heads(model), 2, LossSpec(impl="torch", chunk_mib=1))
        found = joint(ids, ids, torch.arange(13).expand(2, 13)).losses[0]
    return _verdict(torch.allclose(found.loss_sum / len(found.predicted), wanted, rtol=1e-4))


@torch.no_grad()
def _documents(model: Any) -> str:
    lengths = (3, 11, 7)
    ids = torch.randint(1, 80, (1, sum(lengths)), generator=torch.Generator().manual_seed(6))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = vocabulary_projection(model)(hidden_states(model, ids, positions))
    alone = [model(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, 1)]
    wanted = torch.cat(alone)
    return _verdict(torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())))


@torch.no_grad()
def _texts(model: Any) -> list[str]:
    """C and D."""
    model.generation_config.eos_token_id = None
    try:
        Decoder(model, None, chain(0))
    except UserError as error:
        return [str(error)] * 2
    prompts = [torch.randint(1, 80, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 11)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(text[0, len(prompt) :].tolist())
    found = []
    for heads, tree in ((_heads(model), default_tree(NUM, 12)), (None, chain(0))):
        decoder = Decoder(model, heads, tree)
        rows = [*(decoder.generate([prompt], NEW)[0] for prompt in prompts), *decoder.generate(prompts, NEW)]
        # a text ends where the model's positions do
        whole = all(len(row.tokens) == NEW or row.finish == "length" for row in rows)
        same = (row.tokens == text[: len(row.tokens)] for row, text in zip(rows, wanted * 2, strict=True))
        found.append(_verdict(whole and all(same)))
    return found


def _answers_in_time(name: str) -> list[str]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return answers(name)
    except Exception as error:  # whatever a family may raise, it must show in its row
        return [f"not asked: {type(error).__name__}: {' '.join(str(error).split())[:120]}"] * 4
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def page(rows: dict[str, list[str]]) -> str:
    """The table, with the sentences that users read below it."""
    sentences: dict[str, int] = {}
    lines = []
    for name, cells in rows.items():
        family = name.split("/")[0]
        cells = [cell.replace(f"{family}_text", "FAMILY").replace(family, "FAMILY") for cell in cells]
        numbers = [0 if cell in (RIGHT, "wrong") else sentences.setdefault(cell, len(sentences) + 1) for cell in cells]
        marks = [f"[{number}]" if number else cell for number, cell in zip(numbers, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    right = sum(set(cells) == {RIGHT} for cells in rows.values())
    return "\n".join(
        [
            f"# Families of transformers {transformers.__version__}",
            "",
            f"By `python tests/families.py`: {len(rows)} families and variants, {right} right in all four.",
            "Each is built small, with random weights, from its own config class, and compared with transformers:",
            "",
            "- A: the LM head's loss, against the model's own. B: documents of a sequence, against each alone.",
            "- C: greedy text with heads, D: without, against `generate`.",
            "",
            "A number is the sentence below, which a user reads before anything is trained.",
            "",
            "| family | A | B | C | D |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
            *(f"{number}. {sentence}" for sentence, number in sentences.items()),
            "",
        ]
    )


def main(names: list[str]) -> int:
    """Print a row a family; the exit status."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = {}
    for name in names or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in VARIANTS if "/" in name)]:
        rows[name] = _answers_in_time(name)
        print(name, *dict.fromkeys(rows[name]), sep=" | ", flush=True)
    if not names:
        file = Path(__file__).parents[1] / "docs" / "families.md"
        _, heading, others = file.read_text().partition(OTHERS)
        file.write_text(page(dict(sorted(rows.items()))) + heading + others)
    return int(any(cell == "wrong" for cells in rows.values() for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
