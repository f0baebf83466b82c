"""One training step: `longclip.training.step` against the towers of open_clip, with the same weights and objective.

Rivals:

    open_clip   its classic CLIP of context 248, which takes texts padded to 248 (version 3.3), and our losses
    ours        length-sorted micro-batches, last layers where they are read

Captions have 180 +- 38 tokens, summaries about 21, as ShareGPT4V's. First the losses must agree to 1e-6 and the
gradients (of all parameters together) to 1e-5, in float32, else exit code 1.

    python tests/bench/bench_open_clip.py [--quick] [--model B/16] [--batch 32]

Needs `open_clip_torch` and a torchvision built for the installed torch, in addition to what bench_train_step.py needs.
If open_clip cannot be imported, the last line says so and the exit code is 2. One thread, process CPU time. The last
line is JSON; `ratio` is open_clip's time divided by that of this project.
"""

import importlib
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPModel

from harness import alternating, arguments, report
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch
from longclip.training.loss import LossConfig, long_clip_losses
from longclip.training.step import ImageTextBatch, PairEncoder, backward
from longclip.weights.layouts import to_huggingface
from longclip.weights.openai import to_openai
from step_rivals import LENGTH, SHAPES, batch_of, build, fresh


def import_open_clip() -> Any:
    """The module, or the end of the benchmark."""
    try:
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch: an operator does not exist
        reason = str(error).splitlines()[0]
        print(
            f"error: open_clip cannot be imported: {reason}; install open_clip_torch and the torchvision that belongs"
            f" to torch {torch.__version__}",
            file=sys.stderr,
        )
        sys.exit(2)


def rival_of(model: CLIPModel, open_clip: Any) -> torch.nn.Module:
    """open_clip's model with the weights of ours."""
    text, vision = model.config.text_config, model.config.vision_config
    rival = open_clip.model.CLIP(
        embed_dim=model.config.projection_dim,
        quick_gelu=True,
        text_cfg=open_clip.CLIPTextCfg(
            context_length=LENGTH,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
        ),
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
    )
    rival.load_state_dict(to_openai(model.state_dict()))
    return rival.train()


class OpenClip:
    """open_clip's step on a batch."""

    def __init__(self, model: torch.nn.Module, batch: ImageTextBatch, loss: LossConfig) -> None:
        assert batch.summary is not None
        self.model: Any = model
        self.batch, self.loss, self.transform = batch, loss, ImageTransform(224)
        self.caption, self.summary = padded(batch.caption), padded(batch.summary)

    def __call__(self) -> Tensor:
        """The loss; gradients are left in the model."""
        image = self.model.encode_image(self.transform.normalize(self.batch.pixels), normalize=True)
        caption, summary = (self.model.encode_text(ids, normalize=True) for ids in (self.caption, self.summary))
        loss = long_clip_losses(image, caption, summary, self.model.logit_scale.exp(), self.loss)["loss"]
        loss.backward()
        return loss.detach()


def padded(tokens: TokenBatch) -> Tensor:
    """Ids `[n, 248]`."""
    return pad(tokens.input_ids, (0, LENGTH - tokens.input_ids.shape[1]))


def gradient(model: torch.nn.Module) -> Tensor:
    """Of all parameters, in the order of their names at Hugging Face."""
    named = to_huggingface({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return torch.cat([named[name].flatten() for name in sorted(named)])


def main() -> None:
    """Compare, measure, report."""
    options = arguments(
        __doc__,
        model={"choices": list(SHAPES), "default": "B/32"},
        batch={"type": int, "default": None, "help": "pairs (default: 32; 6 with --quick)"},
    )
    open_clip = import_open_clip()
    torch.set_num_threads(1)
    batch = batch_of(options.batch or (6 if options.quick else 32))
    loss = LossConfig(summary_loss_weight=1.0, pca_dim=min(32, len(batch) // 3))
    model = build(options.model, 3 if options.quick else None).train()
    rival = rival_of(model, open_clip)
    encoder = PairEncoder(model, ImageTransform(224))
    steps = {
        "open_clip": partial(fresh, OpenClip(rival, batch, loss), rival),
        "ours": partial(fresh, lambda: backward(encoder, batch, loss)["loss"], model),
    }
    losses = {name: step() for name, step in steps.items()}
    theirs, ours = gradient(rival), gradient(model)
    in_loss = float((losses["ours"] - losses["open_clip"]).abs() / losses["open_clip"])
    in_gradient = float((ours - theirs).norm() / theirs.norm())
    print(f"loss differs by {in_loss:.1e}, gradient by {in_gradient:.1e}", flush=True)
    if in_loss > 1e-6 or in_gradient > 1e-5:
        sys.exit("error: open_clip computes something else")
    seconds = alternating(steps, 3 if options.quick else 5, time.process_time)
    report(
        "open_clip",
        options.quick,
        model=options.model,
        batch=len(batch),
        ratio=round(seconds["open_clip"] / seconds["ours"], 2),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        versions={"open_clip": open_clip.__version__, "torch": torch.__version__},
    )


if __name__ == "__main__":
    main()
