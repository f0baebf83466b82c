"""Primary components of a batch of features (Long-CLIP, arXiv 2403.15378, section 3.3).

The short summary is matched not to the full image feature but to its reconstruction from the `pca_dim` leading
principal components of the batch: R = (X - mean) V_k V_k^T + mean.

Two things differ from the official code, both on purpose. The components are those of the *global* batch, so that the
loss does not depend on how many workers share it. And the gradient goes through the projector P = V_k V_k^T, in
which only the gap between component k and k + 1 enters, instead of through a singular value decomposition, whose
gradient is NaN as soon as any two singular values are equal.

Shapes: N rows of the global batch, n rows of this worker, D features, k components.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from longclip.constants import Scope
from longclip.training import distributed


class Components(NamedTuple):
    """Features without their minor components, and how well conditioned they are."""

    features: Tensor
    """`[n, D]`, as `primary_components` returns them."""
    retained_variance: Tensor
    """Share (0 to 1) of the batch's variance that the components hold; 1 if none is left out."""
    gap: Tensor
    """Eigenvalue k less eigenvalue k + 1, over the largest one. The gradient divides by it: it is noise near the
    rounding error of the features (1e-7). 1 if none is left out."""


def primary_components(features: Tensor, pca_dim: int = 32, scope: Scope = "global") -> Tensor:
    """Reconstruct features from the leading principal components of their batch.

    With `N <= pca_dim + 1` rows, or features of rank `pca_dim` or less, the reconstruction is the input: primary
    component matching then does nothing. Callers who train should refuse such batches.

    Args:
        features: `[n, D]` this worker's features, unit length in Long-CLIP. Computed in float32 or better.
        pca_dim: number k of components kept, `1 <= k`.
        scope: `global` uses the components of all workers' rows (equal gradients for any number of workers),
            `local` those of this worker's, as the official code does.

    Returns:
        `[n, D]` float32 (float64 for float64 input), differentiable once, finite for any finite input. Not normalised.

    Raises:
        ValueError: `features` is not a matrix or `pca_dim` is below 1.
    """
    return components(features, pca_dim, scope).features


def components(features: Tensor, pca_dim: int = 32, scope: Scope = "global") -> Components:
    """`primary_components` with the variance that they retain and the gap after them."""
    if features.ndim != 2:
        raise ValueError(f"features must be [n, D], got shape {tuple(features.shape)}")
    if pca_dim < 1:
        raise ValueError(f"pca_dim must be at least 1, got {pca_dim}")
    if features.dtype != torch.float64:
        features = features.float()
    with torch.autocast(features.device.type, enabled=False):
        return Components(*_PrimaryComponents.apply(features, pca_dim, scope == "global"))


def _total(tensor: Tensor, over_workers: bool) -> Tensor:
    return distributed.sum_over_workers(tensor) if over_workers else tensor


def _eigen(features: Tensor, pca_dim: int, over_workers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean `[D]`, centred rows `[n, D]`, eigenvalues `[D]` descending (float64) and eigenvectors `[D, D]`.

    Centring before the product avoids the cancellation that a large common mean, typical of CLIP, would cause.
    """
    rows = features.shape[0] * (distributed.world_size() if over_workers else 1)
    mean = _total(features.sum(0), over_workers) / rows
    centred = features - mean
    covariance = _total(centred.T @ centred, over_workers).double()
    scale = covariance.trace().clamp(min=torch.finfo(torch.float64).tiny)
    covariance = covariance / scale
    eigenvalues, vectors = torch.linalg.eigh(covariance.to(features.dtype))
    eigenvalues, vectors = eigenvalues.flip(0).double().clamp(min=0), vectors.flip(1)
    if features.dtype != torch.float64:
        eigenvalues, vectors = _refined(covariance, eigenvalues, vectors, pca_dim)
    return mean, centred, eigenvalues * scale, vectors


def _refined(covariance: Tensor, eigenvalues: Tensor, vectors: Tensor, pca_dim: int) -> tuple[Tensor, Tensor]:
    """A float32 decomposition whose leading space is as exact as that of a float64 one, at a part of its cost.

    One Newton step in float64: with v_i the leading and v_j the other vectors, v_i gains
    v_j^T (C - w_i) v_i / (w_i - w_j) of each v_j. The error is squared.
    """
    rest, leading = vectors[:, pca_dim:], vectors[:, :pca_dim].double()
    image = covariance @ leading
    leading_values = (leading * image).sum(0)
    residual = (image - leading * leading_values).to(rest.dtype)  # only this difference of like numbers needs float64
    tolerance = torch.finfo(rest.dtype).eps * len(rest) * eigenvalues[0]
    gap = (leading_values[None, :] - eigenvalues[pca_dim:, None]).clamp(min=tolerance).to(rest.dtype)
    leading = torch.linalg.qr(leading + rest @ (rest.T @ residual / gap)).Q.to(rest.dtype)
    rest = rest - leading @ (leading.T @ rest)
    return torch.cat([leading_values, eigenvalues[pca_dim:]]), torch.cat([leading, rest], dim=1)


class _PrimaryComponents(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, pca_dim: int, over_workers: bool) -> tuple[Tensor, Tensor, Tensor]:
        width = features.shape[1]
        rows = features.shape[0] * (distributed.world_size() if over_workers else 1)
        ctx.pca_dim, ctx.over_workers, ctx.rows = pca_dim, over_workers, rows
        # Statically known cases of rank <= k need no decomposition at all.
        ctx.identity = pca_dim >= min(width, rows - 1)
        if ctx.identity:
            retained, gap = features.new_ones(()), features.new_ones(())
            ctx.mark_non_differentiable(retained, gap)
            return features.clone(), retained, gap
        mean, centred, eigenvalues, vectors = _eigen(features, pca_dim, over_workers)
        leading = vectors[:, :pca_dim]
        # Rank <= k can also come from repeated rows. The leading space is then not unique, the reconstruction is: X.
        # A tensor condition instead of a branch keeps the device free of a synchronisation.
        tolerance = torch.finfo(features.dtype).eps * max(rows, width) * eigenvalues[0]
        compresses = eigenvalues[pca_dim] > tolerance
        ctx.save_for_backward(centred, eigenvalues, vectors, tolerance, compresses)
        reconstruction = torch.addmm(mean, centred @ leading, leading.T)
        smallest = torch.finfo(eigenvalues.dtype).tiny
        retained = eigenvalues[:pca_dim].sum() / eigenvalues.sum().clamp(min=smallest)
        gap = (eigenvalues[pca_dim - 1] - eigenvalues[pca_dim]) / eigenvalues[0].clamp(min=smallest)
        retained, gap = (torch.where(compresses, value, 1.0).to(features.dtype) for value in (retained, gap))
        ctx.mark_non_differentiable(retained, gap)
        return torch.where(compresses, reconstruction, features), retained, gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
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

        through_centred = (gradient_leading + centred @ turn) @ leading.T + centred_leading @ turn.T
        mean_gradient = _total(gradient.sum(0) - through_centred.sum(0), ctx.over_workers) / ctx.rows
        return torch.where(compresses, through_centred.add_(mean_gradient), gradient), None, None
