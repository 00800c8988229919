"""The direction and magnitude codebooks of the PCDVQ paper (arXiv 2506.05432).

Directions are a greedy max-min-angle subset of the directions of short E8 lattice points;
magnitudes are the Lloyd-Max levels of the chi distribution with 8 degrees of freedom, the norm
of 8 independent N(0, 1) weights.
"""

import torch

VECTOR_DIM = 8
MAGNITUDE_LEVELS = 4
DIRECTION_MAX = 127
MAGNITUDE_MAX = 128
SHIFT = 7

# Shells are named by their squared norm. Up to 8 there are 26,400 distinct directions, up to 12
# there are 117,120: the fewest shells that suffice, which also gave the lowest error (2^14 out of
# the 56,640 directions up to 10: 2 % higher).
_LARGEST_SHELL = {14: 8, 16: 12}
_ORDER_MULTIPLIER = 2654435761  # multiplicative hash: Knuth, TAOCP vol. 3, section 6.4


def enumerate_directions(largest_shell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The shortest E8 point of every direction found in shells 2, 4, ..., `largest_shell`.

    E8 is the set of points of Z^8 and of (Z + 1/2)^8 whose coordinates have an even sum.

    Returns float32 points [C, 8] and their squared norms [C], ordered by norm, then by a hash of
    the lexicographic rank: a lexicographic order would make the greedy choice favour one side of
    the sphere among ties, and raise the error by 1 %.
    """
    doubled = torch.cat([_enumerate_coset(odd, 4 * largest_shell) for odd in (0, 1)])
    doubled = doubled[_is_primitive(doubled)]
    norms = doubled.square().sum(1)
    order = torch.arange(len(doubled))
    for key in doubled.T.flip(0):
        order = order[key[order].argsort(stable=True)]
    order = order[(torch.arange(len(order)) * _ORDER_MULTIPLIER % (1 << 32)).argsort()]
    order = order[norms[order].argsort(stable=True)]
    return doubled[order].float() / 2, norms[order].float() / 4


def _enumerate_coset(odd: int, limit: int) -> torch.Tensor:
    """Doubled non-zero points [C, 8] of the even (odd = 0) or odd coset with norm <= limit."""
    largest = int(limit**0.5)
    entries = torch.arange(-largest, largest + 1)
    entries = entries[entries % 2 == odd]
    points = torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(VECTOR_DIM):
        extended = points.repeat_interleave(len(entries), 0)  # [C * E, j]
        points = torch.cat([extended, entries.repeat(len(points))[:, None]], 1)  # [C * E, j + 1]
        points = points[points.square().sum(1) <= limit]
    return points[(points.sum(1) % 4 == 0) & points.any(1)]


def _is_primitive(doubled: torch.Tensor) -> torch.Tensor:
    """Whether no shorter E8 point has the same direction: bool [C] of doubled points [C, 8]."""
    primitive = torch.ones(len(doubled), dtype=torch.bool)
    largest = int(doubled.abs().max())
    for divisor in range(2, largest + 1):
        quotient = doubled // divisor
        divisible = (quotient * divisor == doubled).all(1)
        same_parity = (quotient % 2 == quotient[:, :1] % 2).all(1)
        primitive &= ~(divisible & same_parity & (quotient.sum(1) % 4 == 0))
    return primitive


def select_directions(points: torch.Tensor, norms: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy max-min-angle subset: indices [count] into points [C, 8], in order of choice.

    Starting with point 0, each step takes the point whose largest cosine to the chosen ones is
    smallest, the lowest index on ties. Chosen points only raise these cosines, so all the points
    tied at the minimum are served in order before the minimum can change; the update of all
    candidates is then one matrix product for the batch. The result is that of the one-by-one
    algorithm. Cosines are compared as sign(dot) * dot^2 / (norm * norm), a correctly rounded
    quotient of small exact numbers: ties are exact on every machine.
    """
    closeness = torch.full((len(points),), -2.0)  # [C], signed squared cosine to the chosen set
    index = torch.arange(len(points))
    chosen: list[torch.Tensor] = []
    remaining = count
    while remaining:
        minimum = closeness.min()
        tied = (closeness == minimum).nonzero()[:, 0]
        batch = tied[_pick_tied(points[tied], norms[tied], minimum, remaining)]
        chosen.append(index[batch])
        remaining -= len(batch)
        keep = torch.ones(len(points), dtype=torch.bool)
        keep[batch] = False
        batch_points, batch_norms = points[batch], norms[batch]
        points, norms, index = points[keep], norms[keep], index[keep]
        closeness = _raise_closeness(closeness[keep], points, norms, batch_points, batch_norms)
    return torch.cat(chosen)


def _pick_tied(
    points: torch.Tensor, norms: torch.Tensor, minimum: torch.Tensor, limit: int, block: int = 1024
) -> torch.Tensor:
    """Indices of the points [T, 8] taken, in order, while they stay at the minimum closeness."""
    alive = torch.arange(len(points))
    picked = torch.empty(0, dtype=torch.int64)
    while len(alive) and len(picked) < limit:
        head, alive = alive[:block], alive[block:]
        dots = points[head] @ points[head].T  # [B, B]
        conflict = _signed_square(dots) / (norms[head, None] * norms[head]) > minimum
        taken = head[_pick_in_order(conflict.fill_diagonal_(False))]
        picked = torch.cat([picked, taken])
        untouched = torch.full((len(alive),), -2.0)
        closeness = _raise_closeness(
            untouched, points[alive], norms[alive], points[taken], norms[taken]
        )
        alive = alive[closeness <= minimum]
    return picked[:limit]


def _pick_in_order(conflict: torch.Tensor) -> torch.Tensor:
    """Mask [B] of the items taken when each, in order, excludes those it conflicts with [B, B]."""
    taken = torch.ones(len(conflict), dtype=torch.bool)
    for item in range(len(conflict)):
        if taken[item]:
            taken &= ~conflict[item]
    return taken


def _raise_closeness(
    closeness: torch.Tensor,
    points: torch.Tensor,
    norms: torch.Tensor,
    chosen: torch.Tensor,
    chosen_norms: torch.Tensor,
    chunk: int = 1 << 21,
) -> torch.Tensor:
    """Running maximum [C] of the closeness of points [C, 8] to newly chosen points [B, 8]."""
    for norm in chosen_norms.unique():
        shell = chosen[chosen_norms == norm].T.contiguous()  # [8, S]
        rows = max(1, chunk // shell.shape[1])
        dots = torch.cat([(part @ shell).amax(1) for part in points.split(rows)])
        closeness = torch.maximum(closeness, _signed_square(dots) / (norms * norm))
    return closeness


def _signed_square(x: torch.Tensor) -> torch.Tensor:
    return x * x.abs()


def chi_lloyd_max(levels: int, degrees: int = VECTOR_DIM, iterations: int = 500) -> torch.Tensor:
    """Lloyd-Max levels [levels], ascending, of the chi distribution, on a grid of step 1e-3."""
    radius = torch.arange(1, 12_000, dtype=torch.float64) / 1000  # [R]
    density = (radius.log() * (degrees - 1) - radius.square() / 2).exp()
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    codebook = radius[torch.searchsorted(density.cumsum(0) / density.sum(), quantiles)]
    for _ in range(iterations):
        cell = torch.bucketize(radius, (codebook[1:] + codebook[:-1]) / 2)
        weight = torch.zeros_like(codebook).index_add_(0, cell, density)
        codebook = torch.zeros_like(codebook).index_add_(0, cell, density * radius) / weight
    return codebook


def make_e8_tables(direction_bits: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Build the paper's codebooks for 14 or 16 direction bits.

    Returns directions int8 [2^direction_bits, 8], magnitudes uint8 [4] and `unit`, the levels per
    standard deviation: with level = (direction * magnitude + 64) >> 7, a vector of N(0, 1) is
    approximated by level / unit.
    """
    if direction_bits not in _LARGEST_SHELL:
        raise ValueError(f"direction_bits is {direction_bits}; it must be 14 or 16")
    points, norms = enumerate_directions(_LARGEST_SHELL[direction_bits])
    index = select_directions(points, norms, 1 << direction_bits)
    unit_directions = points[index] / norms[index].sqrt()[:, None]  # [2^direction_bits, 8]
    largest_entry = unit_directions.abs().max()
    directions = (unit_directions * (DIRECTION_MAX / largest_entry)).round().to(torch.int8)

    radii = chi_lloyd_max(MAGNITUDE_LEVELS)
    magnitudes = (radii * (MAGNITUDE_MAX / radii[-1])).round().to(torch.uint8)
    level_of_one = DIRECTION_MAX / largest_entry.item() * MAGNITUDE_MAX / (1 << SHIFT)
    return directions, magnitudes, level_of_one / radii[-1].item()
