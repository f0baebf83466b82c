"""What open_clip makes of weights on disk, run as a process of its own: its packages are not in the environment.

    python through_open_clip.py local-dir:DIRECTORY INPUTS.safetensors OUTPUTS.safetensors < TEXTS.json

The first argument may be a `.pt` file in OpenAI's layout too. INPUTS holds `pixel_values` and a `picture`; OUTPUTS gets
`text_embeds` and `image_embeds`, the `input_ids` of open_clip's tokenizer, and the picture `processed` by its
transform.
"""

import json
import sys

import loadable_torchvision  # noqa: F401  before open_clip
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def main(source: str, inputs: str, outputs: str) -> None:
    """See above."""
    given = load_file(inputs)
    if source.startswith("local-dir:"):
        model, _, preprocess = open_clip.create_model_and_transforms(source)
        tokenizer = open_clip.get_tokenizer(source)
    else:
        model = open_clip.load_openai_model(source, precision="fp32", device="cpu")
        preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
        tokenizer = open_clip.get_tokenizer("ViT-B-16", context_length=model.context_length)
    input_ids = tokenizer(json.load(sys.stdin))
    with torch.no_grad():
        results = {
            "input_ids": input_ids,
            "text_embeds": model.eval().encode_text(input_ids),
            "image_embeds": model.encode_image(given["pixel_values"]),
            "processed": preprocess(Image.fromarray(given["picture"].numpy())),
        }
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
