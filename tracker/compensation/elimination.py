"""Greedy elimination of columns from a pair (H, M), in blocks: the core of backward and forward selection.

Removing column j of consumers W under H = C⁻¹ is W -= w_j h_jᵀ/h_jj and H -= h_j h_jᵀ/h_jj; the price is ‖w_j‖²/h_jj.
Selecting column j of the residual covariance R, with F = W R, is the same algebra: F -= f_j r_jᵀ/r_jj,
R -= r_j r_jᵀ/r_jj; the gain is ‖f_j‖²/r_jj. Only M = WᵀW (or FᵀF) is needed, so the number of consumers costs nothing.
Sources: Hassibi & Stork (1993); lazy blocks after Frantar et al., GPTQ (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
COMPACT = 0.8  # share of columns alive under which the matrices are made smaller


class Elimination:
    """The state of a greedy elimination. Owns, and writes, the matrices that it is given.

    h, m:   (n, n) float64, symmetric
    slots:  (units, columns of the widest) int64: columns of each unit, padded with n
    """

    def __init__(self, h: Tensor, m: Tensor, slots: Tensor, block: int = BLOCK) -> None:
        self.h, self.m, self.slots, self.block = h, m, slots, block
        self.units = torch.arange(len(slots))
        self.pad = slots == h.shape[0]
        self._open()

    def _open(self) -> None:
        """Start a block: u, q = Wᵀz, zᵀz of the columns eliminated in it; (units, c, c) blocks of h and m."""
        n = self.h.shape[0]
        room = self.block + self.slots.shape[1]
        self.u = self.h.new_zeros((n + 1, room))
        self.q = self.h.new_zeros((n, room))
        self.zz = self.h.new_zeros((room, room))
        self.used = 0
        inside = self.slots.clamp(max=n - 1)
        rows, columns = inside[:, :, None], inside[:, None, :]
        void = self.pad[:, :, None] | self.pad[:, None, :]
        self.hb = self.h[rows, columns].masked_fill_(void, 0.0)
        self.mb = self.m[rows, columns].masked_fill_(void, 0.0)
        self.hb += torch.diag_embed(self.pad.to(self.h.dtype))

    def scores(self) -> Tensor:
        """tr(W_u [H_uu]⁻¹ W_uᵀ) of each unit of `units`."""
        if self.slots.shape[1] == 1:
            return (self.mb / self.hb.clamp(min=torch.finfo(torch.float64).tiny)).flatten()
        factor, _ = torch.linalg.cholesky_ex(self.hb)
        return torch.cholesky_solve(self.mb, factor).diagonal(dim1=1, dim2=2).sum(1)

    def eliminate(self, at: int) -> None:
        """Take unit `units[at]` out."""
        for j in self.slots[at][~self.pad[at]].tolist():
            self._column(j)

    def flush_block(self, alive: Tensor) -> Tensor:
        """Multiply a full block out; forget the dead units when there are many. Returns the new `alive`."""
        if self.used < self.block:
            return alive
        u, q = self.u[:-1, : self.used], self.q[:, : self.used]
        q = q - 0.5 * u @ self.zz[: self.used, : self.used]
        self.h.addmm_(u, u.T, alpha=-1)
        self.m.addmm_(u, q.T, alpha=-1).addmm_(q, u.T, alpha=-1)
        live = self.slots[alive]
        kept = live[~self.pad[alive]].sort().values
        n = self.h.shape[0]
        if kept.numel() < COMPACT * n and kept.numel():
            place = torch.full((n + 1,), kept.numel())
            place[kept] = torch.arange(kept.numel())
            self.h = self.h[kept[:, None], kept]
            self.m = self.m[kept[:, None], kept]
            self.slots, self.pad, self.units = place[live], self.pad[alive], self.units[alive]
            alive = torch.ones(len(live), dtype=torch.bool)
        self._open()
        return alive

    def _column(self, j: int) -> None:
        k, row = self.used, self.u[j, : self.used].clone()
        u, q, zz = self.u[:-1, :k], self.q[:, :k], self.zz[:k, :k]
        column = torch.addmv(self.h[j], u, row, alpha=-1)
        pivot = float(column[j])
        if pivot <= 0.0:  # rounding ate what was left of it: nothing more to take away
            return
        wz = q[j] - zz @ row  # zᵀw_j
        outer = torch.addmv(self.m[j], q, row, alpha=-1)  # W₀ᵀw_j
        moved = torch.addmv(outer, u, wz, alpha=-1)  # Wᵀw_j
        root = pivot**0.5
        new, old = column / root, moved / root
        norm = float(moved[j]) / pivot
        self.u[:-1, k], self.q[:, k] = new, outer / root
        self.zz[k, :k] = self.zz[:k, k] = wz / root
        self.zz[k, k] = norm
        self.used += 1
        new = self.u[:, k][self.slots]
        old = torch.cat((old, old.new_zeros(1)))[self.slots]
        self.hb -= new[:, :, None] * new[:, None, :]
        cross = new[:, :, None] * old[:, None, :]
        self.mb -= cross + cross.mT - norm * new[:, :, None] * new[:, None, :]
