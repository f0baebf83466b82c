"""A small untrained vision-language model of a real architecture, as a directory."""

import pytest
import torch
import transformers

from tests.support.text_models import SMALL, SPECIAL, WORDS, tokenizer

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : "
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LLaVA with a vision tower of four patches."""
    words = tokenizer(end=False)
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    words.image_token, words.image_token_id = IMAGE, len(SPECIAL) + len(WORDS)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **SMALL)
    text = transformers.LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **SMALL)
    text.pad_token_id, text.eos_token_id, text.bos_token_id = 0, 1, 3
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(words) - 1)
    config.vision_feature_layer, config.image_seq_length = -1, 4
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # large enough for its answers to depend on what it sees
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.6)
    model.generation_config.suppress_tokens = [0, 2, 3, len(words) - 1]
    model.generation_config.eos_token_id = 1
    directory = str(tmp_path_factory.mktemp("llava"))
    model.save_pretrained(directory)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    ).save_pretrained(directory)
    return directory
