"""The same training in plain PyTorch, float64, every document by itself: shares no code with the package."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from worker import STEPS, make_recipe, make_sequences

RATES = (0.5, 1.0, 1.0, 0.55)  # warm-up over half of four steps, then half a cosine down to a tenth


def train(
    weights: Path, stage: int, layers: int = 1, kind: str = "medusa"
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train from the weights of a file.

    Returns:
        Loss of each step, gradient norm of each step before clipping, final weights.
    """
    recipe = make_recipe("unused", stage=stage)
    state = {name: tensor.double() for name, tensor in load_file(weights).items()}
    config = dict(recipe.model.config)
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).double()
    part, prefix = (backbone, "backbone.") if stage == 2 else (backbone.model, "backbone.model.")  # no LM head there
    part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    heads = {name: v.clone().requires_grad_() for name, v in state.items() if name.startswith("heads.")}
    trained = dict(heads)
    if stage == 2:
        trained |= {f"backbone.{name}": parameter for name, parameter in backbone.named_parameters()}
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() == 2 else 0.0, "scale": 4.0 if stage == 2 and n in heads else 1}
        for n, p in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"] * RATES[step]
        sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(4)], [0, 0, 0, 0]
        for batch in make_sequences(step):
            starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.labels.shape[1]]
            for start, stop in pairwise(starts):
                ids, labels = batch.input_ids[:, start:stop], batch.labels[0, start:stop]
                with torch.set_grad_enabled(stage == 2):
                    hidden = backbone.model(input_ids=ids).last_hidden_state[0]
                embedded = backbone.get_input_embeddings()(ids[0]).detach()
                embedded = embedded / embedded.square().mean(-1, keepdim=True).add(1e-6).sqrt()
                for k in range(0 if stage == 2 else 1, 4):
                    if k and kind == "hydra":  # the hidden states become those that saw k more tokens
                        name, known = f"heads.{k - 1}.step", max(len(labels) - k, 0)
                        pair = torch.cat([hidden[:known], embedded[k:]], 1)
                        hidden = hidden[:known] + F.silu(pair @ heads[f"{name}.weight"].T + heads[f"{name}.bias"])
                    x = hidden
                    for layer in range(layers - (kind == "hydra") if k else 0):
                        name = f"heads.{k - 1}.blocks.{layer}"
                        x = x + F.silu(x @ heads[f"{name}.weight"].T + heads[f"{name}.bias"])
                    matrix = heads[f"heads.{k - 1}.projection.weight"] if k else backbone.lm_head.weight
                    targets = labels[k + 1 :]
                    logits = (x @ matrix.T)[: len(targets)]
                    sums[k] = sums[k] + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
                    counts[k] += int((targets != -100).sum())
        weights_of = [1.0, *((0.2 if stage == 2 else 1.0) * 0.8**k for k in (1, 2, 3))]
        loss = sum(w * s / c for w, s, c in zip(weights_of, sums, counts, strict=True) if c)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach() for name, parameter in trained.items()}
