"""A family of each kind that once learned from wrong numbers, or ended in a traceback, against transformers."""

import pytest
from families import RIGHT, answers

ALONE = "not packed: {} does not keep documents of one sequence apart by their position ids"
STATE = "model.name: not decoded: layers of {} carry a state that cannot go back to an earlier token; its heads can be "
KINDS = {
    "llama": [RIGHT, RIGHT, RIGHT],
    "gemma2": [RIGHT, RIGHT, RIGHT],  # logits and scores with a cap, no sdpa
    "cohere": [RIGHT, RIGHT, RIGHT],  # logits times a factor
    "minicpm3": [RIGHT, RIGHT, RIGHT],  # the same by its width; a latent
    "phi": [RIGHT, RIGHT, RIGHT],  # a bias
    "gpt_oss": [RIGHT, ALONE, RIGHT],  # scores of nothing, no sdpa, windows
    "gpt2": [RIGHT, RIGHT, RIGHT],  # no key and value heads in its config; a table of positions
    "opt": [RIGHT, ALONE, RIGHT],  # positions counted from a mask
    "falcon": [RIGHT, (RIGHT, ALONE), RIGHT],  # attends by itself; packed or not by the version of transformers
    "mimo_v2_flash": [RIGHT, RIGHT, RIGHT],  # keys and values of several shapes
    "deepseek_v32": [RIGHT, RIGHT, RIGHT],  # selects what it attends to by keys of its own
    "llama4_text": [RIGHT, (RIGHT, ALONE), RIGHT],  # chunks; packed or not by the version of transformers
    "lfm2": [RIGHT, ALONE, STATE],  # convolutions
    "qwen3_next": [RIGHT, ALONE, STATE],  # a recurrence
    "bart": [RIGHT, ALONE, "model.name: not decoded: {} counts positions itself, so that no two guesses can stand"],
    "llama/dynamic": [RIGHT, RIGHT, RIGHT],  # positions that turn when a text grows
    "modernbert-decoder": ["model.name: logits of {} are not its hidden states times a matrix; heads need that"] * 3,
}


@pytest.mark.parametrize("family", KINDS)
def test_loss_documents_and_texts_are_transformers_own_or_refused(family):
    """Mutations: drop factor, cap or bias in `projection.Logits`; pack whatever comes; one shape for all layers."""
    loss, documents, with_heads, plain = answers(family)
    right_loss, right_documents, right_text = KINDS[family]
    allowed = [right_documents] if isinstance(right_documents, str) else right_documents
    assert loss == right_loss.format(family)
    assert documents in [sentence.format(family) for sentence in allowed]
    assert with_heads == plain and with_heads.startswith(right_text.format(family))
