"""x"""

from torch import nn
from transformers import PreTrainedModel
from medusa_ds.model.heads import VocabularyProjection


def use_vocabulary_projection(backbone: PreTrainedModel) -> None:
    """Replace the LM head by a `VocabularyProjection` that owns the same parameter (tied or not)."""
    lm_head = backbone.get_output_embeddings()
    projection = VocabularyProjection(lm_head.in_features, lm_head.out_features, device="meta")
    projection.weight = lm_head.weight
    backbone.set_output_embeddings(projection)
