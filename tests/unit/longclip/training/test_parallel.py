"""Two workers that hold the model each, or share it: the steps of one process. A shared model takes half of the memory
on each, and its checkpoints are written whole."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from longclip.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from longclip.encode import encode_image, encode_text
from longclip.images import ImageTransform
from longclip.stretch import text_positions
from longclip.tokenizer import build_tokenizer
from longclip.training.compiling import compile_layers
from longclip.training.freeze import lock_tower
from longclip.training.fsdp import clip_gradients, shard, whole_outside_layers
from longclip.training.step import PairEncoder, backward, clamp_logit_scale, parameter_groups
from tests.support.training_steps import LOSS, assert_same_gradients, share_of_batch, tiny_encoder
from tests.support.workers import run_workers

pytestmark = pytest.mark.slow

WORKERS, STEPS = 2, 3
STRATEGIES = ("ddp", "fsdp")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in chunks": {"chunk_size": 2},
    "with checkpointed layers": {"checkpoint_layers": True},
    "compiled": {"compiled": True, "chunk_size": 2, "checkpoint_layers": True},
    "with a locked tower": {"locked": True, "chunk_size": 3},
}


class Training:
    """A run of some steps in one of the `WAYS`, with one of the `STRATEGIES`."""

    def __init__(
        self,
        strategy: str | None,
        chunk_size: int | None = None,
        checkpoint_layers: bool = False,
        compiled: bool = False,
        locked: bool = False,
    ) -> None:
        self.encoder = tiny_encoder(checkpoint_layers=checkpoint_layers).train()
        self.module: PairEncoder | DistributedDataParallel = self.encoder
        self.chunk_size = chunk_size
        if locked:
            lock_tower(self.encoder.model, "image")
        if strategy and compiled:
            compile_layers(self.encoder.model, "aot_eager")
        if strategy == "fsdp":
            shard(self.encoder)
        elif strategy == "ddp":
            self.module = DistributedDataParallel(self.encoder)
        # A larger epsilon: gradients that are zero but for rounding must not become steps of full size.
        self.optimizer = torch.optim.AdamW(parameter_groups(self.encoder.model, 0.1), lr=1e-3, eps=1e-4, fused=True)

    def step(self, world_size: int, rank: int) -> dict[str, Any]:
        """Losses, norm and gradients of a step."""
        self.optimizer.zero_grad()
        losses = backward(self.module, share_of_batch(world_size, rank), LOSS, self.chunk_size)
        gradients = {name: whole(p.grad) for name, p in self.encoder.named_parameters() if p.grad is not None}
        norm = clip_gradients(self.encoder, 1.0)
        self.optimizer.step()
        clamp_logit_scale(self.encoder.model)
        return {"losses": losses, "norm": norm, "gradients": gradients}

    def features(self) -> list[Tensor]:
        """Of both towers, used by themselves."""
        batch, transform = share_of_batch(1, 0), ImageTransform(32)
        with torch.no_grad(), whole_outside_layers(self.encoder):
            image = encode_image(self.encoder.model, transform.normalize(batch.pixels).double())
            return [image, encode_text(self.encoder.model, batch.caption)]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def held(encoder: PairEncoder, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and optimizer state of this process."""
    tensors = [tensor for p in encoder.parameters() for tensor in (p, p.grad, *optimizer.state[p].values())]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum(tensor.nbytes for tensor in local)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    found: dict[Any, Any] = {}
    for strategy, (way, settings) in product(STRATEGIES, WAYS.items()):
        run = Training(strategy, **settings)
        found[strategy, way] = {
            "steps": [run.step(WORKERS, rank) for _ in range(STEPS)],
            "parameters": {name: whole(p) for name, p in run.encoder.named_parameters()},
            "features": run.features(),
            "held": held(run.encoder, run.optimizer),
        }

    # A checkpoint in the middle, from which another run resumes.
    first, second = Training("fsdp"), Training("fsdp")
    first.step(WORKERS, rank)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any
    weights, state = get_state_dict(first.encoder.model, first.optimizer, options=options)
    if rank == 0:
        checkpoint = Checkpoint(first.encoder.model, build_tokenizer(64), first.encoder.transform)
        save_checkpoint(checkpoint, f"{folder}/checkpoint", {}, weights)
        torch.save((weights, state), f"{folder}/state.pt")
    dist.barrier()
    weights, state = torch.load(f"{folder}/state.pt", mmap=True)
    found["saved"] = {name: whole(p) for name, p in first.encoder.model.named_parameters()}
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        second.encoder.model, second.optimizer, model_state_dict=weights, optim_state_dict=state, options=options
    )
    found["unbroken"], found["resumed"] = first.step(WORKERS, rank), second.step(WORKERS, rank)
    found["ends"] = [{n: whole(p) for n, p in run.encoder.named_parameters()} for run in (first, second)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two workers have left what they found."""
    folder = tmp_path_factory.mktemp("sharding")
    run_workers(_worker, str(folder), count=WORKERS)
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
def test_steps_equal_those_of_one_process(way: str, strategy: str, workers: list[dict[Any, Any]]) -> None:
    alone = Training(None, **WAYS[way])
    start = whole(text_positions(alone.encoder.model))
    steps = [alone.step(1, 0) for _ in range(STEPS)]
    results = [found[strategy, way] for found in workers]
    for number, step in enumerate(steps):
        for result in results:
            assert_same_gradients(result["steps"][number]["gradients"], step["gradients"], 1e-9)
            torch.testing.assert_close(result["steps"][number]["norm"], step["norm"], rtol=1e-9, atol=0)
        for name, loss in step["losses"].items():
            mean = sum(result["steps"][number]["losses"][name] for result in results) / WORKERS
            torch.testing.assert_close(mean, loss, rtol=1e-9, atol=0)
    assert steps[-1]["losses"]["loss"] < steps[0]["losses"]["loss"]
    for result in results:
        torch.testing.assert_close(result["parameters"], dict(alone.encoder.named_parameters()), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(result["features"], alone.features(), rtol=1e-7, atol=1e-8)
        positions = result["parameters"]["model.text_model.embeddings.position_embedding.weight"]
        assert torch.equal(positions[:20], start[:20])
        assert not torch.equal(positions[20:], start[20:])


def test_each_worker_has_its_shard(workers: list[dict[Any, Any]]) -> None:
    for found in workers:
        assert found["fsdp", "plain"]["held"] < 0.51 * found["ddp", "plain"]["held"]


def test_checkpoint_is_complete_and_resumed(folder: Path, workers: list[dict[Any, Any]]) -> None:
    written = load_checkpoint(folder / "checkpoint").model
    saved = {name: tensor.float() for name, tensor in workers[0]["saved"].items()}
    torch.testing.assert_close(dict(written.named_parameters()), saved, rtol=0, atol=0)
    for found in workers:
        unbroken, resumed = found["ends"]
        torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)
        torch.testing.assert_close(found["resumed"]["losses"], found["unbroken"]["losses"], rtol=0, atol=0)


def test_sharding_needs_workers() -> None:
    with pytest.raises(ValueError, match="process group"):
        shard(tiny_encoder())
