"""Best approximations of low rank, for one matrix or a stack of them, and what they lose.

The best approximation of rank q of a matrix in the Frobenius norm is the sum of its first q singular triplets, and its
error the root of the sum of the other squared singular values (Eckart and Young, 1936). All of it is done in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxlora.errors import ConfigError
from fxlora.rendering import Section, aligned


@dataclass(frozen=True, slots=True)
class SVD:
    """A singular value decomposition `U diag(S) Vh`: `(…, rows, q)`, `(…, q)` in descending order, `(…, q, columns)`."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, matrices: Tensor, driver: str | None = None) -> SVD:
        """Of matrices `(…, rows, columns)`, in their dtype, float32 at least."""
        wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        return cls(*torch.linalg.svd(wide, full_matrices=False, driver=driver))

    @classmethod
    def of_product(cls, A: Tensor, B: Tensor) -> SVD:
        """Of `B A`, in float64, without making the product: of the small core between two orthogonal factors.

        Args:
            A: `(…, q, columns)`.
            B: `(…, rows, q)`.
        """
        left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        return cls(left.Q @ U, S, Vh @ right.Q.mT)

    def factors(self, r: int) -> tuple[Tensor, Tensor]:
        """A and B of the best approximation of rank r, or of all that there is; the singular values are in B."""
        return self.Vh[..., :r, :], self.U[..., :r] * self.S[..., None, :r]

    def rank_for(self, max_error: float) -> int:
        """The smallest rank, of all matrices alike, at which the relative error of the stack is at most `max_error`."""
        squares = self.S.double().square()
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        lost = squares.flip(0).cumsum(0)  # by how many are left out, from one
        allowed = int((lost.sqrt() <= max_error * lost[-1].sqrt()).sum())
        return max(1, squares.shape[0] - allowed)


def product_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of `B A` over all matrices of a stack, from the factors, in float64."""
    left, right = torch.linalg.qr(B.double(), mode="r").R, torch.linalg.qr(A.double().mT, mode="r").R
    return float((left @ right.mT).norm())


@dataclass(frozen=True, slots=True)
class SiteRank:
    """What an approximation of low rank kept of the update at one site.

    Attributes:
        site: name of the layer or parameter.
        rank: of the approximation.
        rank_before: of what it approximates: of its factors, or the largest that its shape allows.
        norm: Frobenius norm of the update.
        error: Frobenius norm of the difference, as measured on the factors that were stored.
    """

    site: str
    rank: int
    rank_before: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """`error / norm`; 0 where there is no update."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def kept_energy(self) -> float:
        """The share of the squared norm that is left: `1 - relative_error²`."""
        return 1.0 - self.relative_error**2

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data for JSON."""
        return {
            "site": self.site,
            "rank": self.rank,
            "rank_before": self.rank_before,
            "norm": self.norm,
            "error": self.error,
            "relative_error": self.relative_error,
            "kept_energy": self.kept_energy,
        }


def total(sites: tuple[SiteRank, ...]) -> SiteRank:
    """All sites as one: norms and errors are roots of sums of squares, ranks are sums."""
    norm, error = (
        sum(value**2 for value in values) ** 0.5 for values in ([s.norm for s in sites], [s.error for s in sites])
    )
    return SiteRank("total", sum(s.rank for s in sites), sum(s.rank_before for s in sites), norm, error)


_HEADER = ("site", "rank", "of", "norm", "error", "relative")
_NUMBERS = (1, 2, 3, 4, 5)


def _rows(sites: tuple[SiteRank, ...]) -> list[tuple[str, ...]]:
    return [
        (s.site, str(s.rank), str(s.rank_before), f"{s.norm:.4g}", f"{s.error:.4g}", f"{s.relative_error:.2%}")
        for s in (*sites, total(sites))
    ]


def table(sites: tuple[SiteRank, ...]) -> str:
    """The figures of all sites and of their total, aligned."""
    return "\n".join(aligned([_HEADER, *_rows(sites)], _NUMBERS))


def section(sites: tuple[SiteRank, ...], heading: str = "", lines: tuple[str, ...] = ()) -> Section:
    """The same for reports, with a heading and lines below."""
    return Section(heading, header=_HEADER, rows=tuple(_rows(sites)), right=_NUMBERS, lines=lines)


def check_rank_choice(r: int | None, max_error: float | None) -> None:
    """Refuse a rank and a bound for the error that cannot work.

    Raises:
        ConfigError: says what would.
    """
    if r is None and max_error is None:
        raise ConfigError("give a rank `r`, or `max_error`, the largest relative error of a site (0.1 for 10%)")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"`r` should be a positive integer value but the value passed is {r!r}")
    if max_error is not None and not 0 <= max_error < 1:
        raise ConfigError(f"`max_error` should be a relative error in [0, 1) but the value passed is {max_error!r}")
