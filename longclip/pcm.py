"""Primary components of a batch of features (Long-CLIP, arXiv 2403.15378, section 3.3).

The short summary is matched not to the full image feature but to its reconstruction from the `pca_dim` leading
principal components of the batch: R = (X - mean) V_k V_k^T + mean.

Two things differ from the official code, both on purpose. The components are those of the *global* batch, so that the
loss does not depend on how many workers share it. And the gradient goes through the projector P = V_k V_k^T, in
which only the gap between component k and k + 1 enters, instead of through a singular value decomposition, whose
gradient is NaN as soon as any two singular values are equal.

Shapes: N rows of the global batch, n rows of this worker, D features, k components.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from longclip import distributed

Scope = Literal["global", "local"]


def primary_components(features: Tensor, pca_dim: int = 32, scope: Scope = "global") -> Tensor:
    """Reconstruct features from the leading principal components of their batch.

    With `N <= pca_dim + 1` rows, or features of rank `pca_dim` or less, the reconstruction is the input: primary
    component matching then does nothing. Callers who train should refuse such batches.

    Args:
        features: `[n, D]` this worker's features, unit length in Long-CLIP. Computed in float32 or better.
        pca_dim: number k of components kept, `1 <= k`.
        scope: `global` takes the components of all workers' rows (equal gradients for any number of workers),
            `local` those of this worker's, as the official code does.

    Returns:
        `[n, D]` float32 (float64 for float64 input), differentiable once, finite for any finite input. Not normalised.

    Raises:
        ValueError: `features` is no matrix or `pca_dim` is below 1.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [n, D], got shape {tuple(features.shape)}")
    if pca_dim < 1:
        raise ValueError(f"pca_dim must be at least 1, got {pca_dim}")
    if features.dtype != torch.float64:
        features = features.float()
    with torch.autocast(features.device.type, enabled=False):
        return _PrimaryComponents.apply(features, pca_dim, scope == "global")


def retained_variance(features: Tensor, pca_dim: int = 32) -> Tensor:
    """Share (0 to 1) of the global batch's variance that its first `pca_dim` components hold; `features [n, D]`."""
    with torch.no_grad():
        eigenvalues = _eigen(features.detach().float(), over_workers=True)[2]
        return eigenvalues[:pca_dim].sum() / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)


def _total(tensor: Tensor, over_workers: bool) -> Tensor:
    return distributed.sum_over_workers(tensor) if over_workers else tensor


def _eigen(features: Tensor, over_workers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean `[D]`, centred rows `[n, D]`, eigenvalues `[D]` descending (float64) and eigenvectors `[D, D]`.

    Centring before the product avoids the cancellation that a large common mean, typical of CLIP, would cause. The
    decomposition itself runs in float64, where it is as accurate as a float64 SVD of the float32 features.
    """
    rows = features.shape[0] * (distributed.world_size() if over_workers else 1)
    mean = _total(features.sum(0), over_workers) / rows
    centred = features - mean
    covariance = _total(centred.T @ centred, over_workers)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    return mean, centred, eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1).to(features.dtype)


class _PrimaryComponents(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, pca_dim: int, over_workers: bool) -> Tensor:
        width = features.shape[1]
        rows = features.shape[0] * (distributed.world_size() if over_workers else 1)
        ctx.pca_dim, ctx.over_workers, ctx.rows = pca_dim, over_workers, rows
        # Statically known cases of rank <= k need no decomposition at all.
        ctx.identity = pca_dim >= min(width, rows - 1)
        if ctx.identity:
            return features.clone()
        mean, centred, eigenvalues, vectors = _eigen(features, over_workers)
        leading = vectors[:, :pca_dim]
        # Rank <= k can also come from repeated rows. The leading space is then not unique, the reconstruction is: X.
        # A tensor condition instead of a branch keeps the device free of a synchronisation.
        tolerance = torch.finfo(features.dtype).eps * max(rows, width) * eigenvalues[0]
        compresses = eigenvalues[pca_dim] > tolerance
        ctx.save_for_backward(centred, eigenvalues, vectors, tolerance, compresses)
        reconstruction = centred @ leading @ leading.T + mean
        return torch.where(compresses, reconstruction, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.identity:
            return gradient, None, None
        k = ctx.pca_dim
        centred, eigenvalues, vectors, tolerance, compresses = ctx.saved_tensors
        leading, rest = vectors[:, :k], vectors[:, k:]
        centred_leading, gradient_leading = centred @ leading, gradient @ leading  # [n, k]

        # dL/dC between the kept and the dropped space: v_i^T (Xc^T G + G^T Xc) v_j over the gap w_i - w_j, i <= k < j.
        cross = _total(centred_leading.T @ gradient + gradient_leading.T @ centred, ctx.over_workers)  # [k, D]
        gap = (eigenvalues[:k, None] - eigenvalues[None, k:]).clamp(min=tolerance)
        turn = rest @ ((cross @ rest) / gap.to(cross.dtype)).T  # [D, k]

        through_centred = gradient_leading @ leading.T + centred_leading @ turn.T + (centred @ turn) @ leading.T
        mean_gradient = _total((gradient - through_centred).sum(0), ctx.over_workers) / ctx.rows
        return torch.where(compresses, through_centred + mean_gradient, gradient), None, None
