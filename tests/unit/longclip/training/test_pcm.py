"""Primary components: official numbers, the true gradient, degenerate batches, and any number of workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from longclip.training.pcm import components, primary_components
from tests.support.workers import run_workers


def random_features(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit rows around a large common mean, with a falling spectrum: what CLIP features look like."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, width, generator=draw, dtype=torch.float64) * torch.linspace(1, 0.2, width).double()
    return normalize(spread + 2 * torch.randn(width, generator=draw, dtype=torch.float64), dim=1).to(dtype)


def by_svd(features: Tensor, k: int) -> Tensor:
    """The definition, differentiated by torch."""
    mean = features.mean(0)
    _, _, directions = torch.linalg.svd(features - mean, full_matrices=False)
    leading = directions[:k].T
    return (features - mean) @ leading @ leading.T + mean


def gradient_of(function: Callable[[Tensor], Tensor], features: Tensor, upstream: Tensor) -> Tensor:
    features = features.clone().requires_grad_()
    function(features).backward(upstream)
    assert features.grad is not None
    return features.grad


# --- numbers ---


@pytest.mark.parametrize("case", ["33x96", "34x96", "200x96", "64x512"])
def test_parity_with_the_official_code(case: str, vectors: Path) -> None:
    recorded = load_file(vectors / "official_pca32.safetensors")
    features = recorded[f"{case}.x"].requires_grad_()
    reconstruction = primary_components(features, 32)
    reconstruction.backward(recorded[f"{case}.grad_out"])
    torch.testing.assert_close(reconstruction.detach(), recorded[f"{case}.out"], rtol=0, atol=1e-6)
    expected = recorded[f"{case}.grad_x"]
    assert features.grad is not None
    assert (features.grad - expected).norm() <= 2e-5 * expected.norm()


def test_32_components_of_32_dimensions_reproduce_the_features(vectors: Path) -> None:
    recorded = load_file(vectors / "official_longclip_tiny.safetensors")
    features = normalize(recorded["image_embeds"], dim=1)
    expected = recorded["pca32_of_normalized_image_embeds"]
    torch.testing.assert_close(primary_components(features, 32), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "width", "k"), [(40, 12, 3), (12, 40, 3), (34, 96, 32), (9, 9, 1), (50, 8, 7)])
def test_value_and_gradient_equal_differentiated_svd(rows: int, width: int, k: int) -> None:
    features = random_features(rows, width)
    upstream = torch.randn(rows, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = by_svd(features, k)
    assert (features - expected).abs().max() > 1e-3  # something is left out
    torch.testing.assert_close(primary_components(features, k), expected, rtol=0, atol=1e-12)
    actual_gradient = gradient_of(lambda x: primary_components(x, k), features, upstream)
    expected_gradient = gradient_of(lambda x: by_svd(x, k), features, upstream)
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradcheck(k: int) -> None:
    features = random_features(9, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, k), (features,))


def test_float32_gradient_is_near_the_exact_one() -> None:
    features = random_features(64, 128, dtype=torch.float32)
    upstream = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    actual = gradient_of(lambda x: primary_components(x, 16), features, upstream).double()
    exact = gradient_of(lambda x: by_svd(x, 16), features.double(), upstream.double())
    assert (actual - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_small_batches_are_reproduced_exactly(rows: int) -> None:
    features, upstream = random_features(rows, 20), torch.randn(rows, 20, dtype=torch.float64)
    assert torch.equal(primary_components(features, 8), features)
    assert torch.equal(gradient_of(lambda x: primary_components(x, 8), features, upstream), upstream)
    assert not torch.equal(primary_components(random_features(10, 20), 8), random_features(10, 20))


def test_retained_variance_and_spectral_gap() -> None:
    features = random_features(40, 12)
    values = torch.linalg.svdvals(features - features.mean(0)).square()
    found = components(features, 3)
    assert found.retained_variance.item() == pytest.approx((values[:3].sum() / values.sum()).item(), abs=1e-12)
    assert found.gap.item() == pytest.approx(((values[2] - values[3]) / values[0]).item(), abs=1e-12)
    for whole in (components(features, 12), components(torch.ones(5, 4), 2)):
        assert (whole.retained_variance.item(), whole.gap.item()) == (1.0, 1.0)


# --- degenerate batches ---


def _repeated_spectrum(rows: int, width: int, k: int) -> Tensor:
    """Rows whose first k singular values are exactly equal, where the gradient of an SVD is NaN."""
    draw = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(rows, width, generator=draw, dtype=torch.float64)).Q
    left = torch.linalg.qr(left - left.mean(0)).Q
    right = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q
    values = torch.cat([torch.full((k,), 3.0), torch.linspace(1, 0.1, width - k)]).double()
    return left @ torch.diag(values) @ right.T


DEGENERATE: dict[str, tuple[Tensor, int]] = {
    "constant": (torch.ones(40, 16), 4),
    "zero": (torch.zeros(40, 16), 4),
    "every row twice": (random_features(10, 64, dtype=torch.float32).repeat(2, 1), 12),
    "every row twice, compressed": (random_features(20, 64, dtype=torch.float32).repeat(2, 1), 12),
    "fewer dimensions than components": (random_features(20, 8, dtype=torch.float32), 32),
    "20 x 8": (random_features(20, 8, dtype=torch.float32), 4),
    "equal singular values": (_repeated_spectrum(40, 16, 4).float(), 4),
    "equal at the cut": (_repeated_spectrum(40, 16, 8).float(), 4),
    "orthonormal": (torch.eye(40), 8),
    "tiny": (random_features(40, 16, dtype=torch.float32) * 1e-18, 4),
    "huge": (random_features(40, 16, dtype=torch.float32) * 1e12, 4),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_batches_are_finite(name: str) -> None:
    features, k = DEGENERATE[name]
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(7))
    reconstruction = primary_components(features, k)
    assert reconstruction.isfinite().all()
    assert gradient_of(lambda x: primary_components(x, k), features, upstream).isfinite().all()
    assert all(value.isfinite().all() for value in components(features, k))
    spectrum = torch.linalg.matrix_rank((features - features.mean(0)).double(), rtol=1e-5)
    if spectrum <= k:
        torch.testing.assert_close(reconstruction, features)


def test_gradient_with_equal_leading_singular_values() -> None:
    features, k = _repeated_spectrum(40, 16, 4), 4
    upstream = torch.randn(40, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    actual = gradient_of(lambda x: primary_components(x, k), features, upstream)
    direction = torch.randn(40, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    step = 1e-6
    ahead, behind = (by_svd(features + sign * step * direction, k) for sign in (1, -1))
    slope = ((ahead - behind) * upstream).sum() / (2 * step)
    assert (actual * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    features = random_features(40, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reconstruction = primary_components(features, 4)
    assert reconstruction.dtype == torch.float32
    torch.testing.assert_close(reconstruction, by_svd(features.float(), 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "k", "named"), [((4,), 2, "features"), ((2, 4, 4), 2, "features"), ((4, 4), 0, "pca")]
)
def test_bad_arguments(shape: tuple[int, ...], k: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        primary_components(torch.zeros(shape), k)


# --- several workers ---

ROWS, WIDTH, K = 48, 20, 5


def _measure(features: Tensor, upstream: Tensor, scope: Any) -> dict[str, Tensor]:
    features = features.clone().requires_grad_()
    found = components(features, K, scope)
    found.features.backward(upstream)
    assert features.grad is not None
    return {"value": found.features.detach(), "gradient": features.grad, "retained": found.retained_variance}


def _upstream() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _worker(rank: int, folder: str) -> None:
    """Measure with all four workers, then with the first two alone, each holding its share of the same batch."""
    torch.set_num_threads(1)
    for world_size in (4, 2):
        if rank >= world_size:
            return
        store = f"file://{folder}/store{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        share = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
        results = {
            (dtype, scope): _measure(random_features(ROWS, WIDTH)[share].to(dtype), _upstream()[share].to(dtype), scope)
            for dtype in (torch.float64, torch.float32)
            for scope in ("global", "local")
        }
        torch.save(results, f"{folder}/{world_size}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """Results of real processes: workers -> result of each rank."""
    folder = tmp_path_factory.mktemp("workers")
    run_workers(_worker, str(folder), count=4)
    return {
        world_size: [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]
        for world_size in (2, 4)
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_result_does_not_depend_on_the_number_of_workers(
    world_size: int, dtype: torch.dtype, tolerance: float, by_workers: dict[int, list[dict]]
) -> None:
    alone = _measure(random_features(ROWS, WIDTH).to(dtype), _upstream().to(dtype), "global")
    together = [result[dtype, "global"] for result in by_workers[world_size]]
    for name in ("value", "gradient"):
        joined = torch.cat([result[name] for result in together])
        torch.testing.assert_close(joined, alone[name], rtol=0, atol=tolerance)
    for result in together:
        torch.testing.assert_close(result["retained"], alone["retained"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_local_scope_uses_only_the_rows_of_the_worker(world_size: int, by_workers: dict[int, list[dict]]) -> None:
    for rank, result in enumerate(by_workers[world_size]):
        share = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
        alone = _measure(random_features(ROWS, WIDTH)[share], _upstream()[share], "local")
        local = result[torch.float64, "local"]
        torch.testing.assert_close(local["value"], alone["value"], rtol=0, atol=1e-10)
        torch.testing.assert_close(local["gradient"], alone["gradient"], rtol=0, atol=1e-10)
        assert (local["value"] - result[torch.float64, "global"]["value"]).abs().max() > 1e-3
