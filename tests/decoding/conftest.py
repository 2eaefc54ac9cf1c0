import pytest
import torch
from decoding_models import FAMILIES, VOCAB, Case, build, reference
from transformers import PreTrainedModel


@pytest.fixture(scope="session", params=list(FAMILIES))
def case(request) -> Case:
    model = build(request.param)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in range(1, 51)]
    prompts = prompts if request.param in ("llama", "qwen3") else prompts[::2]
    texts = [reference(model, prompt, 20) for prompt in prompts]
    return Case(model, prompts, texts, [reference(model, prompt, 26, eos_token_id=VOCAB) for prompt in prompts])


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return build("llama")
