"""What reports of service say of two users who wait throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WINDOW = 5.0  # seconds, of a share


def gap_and_shares(
    reports: Sequence[tuple[float, Mapping[str, float]]], quotas: Mapping[str, float], began: float, ended: float
) -> tuple[float, list[float]]:
    """(the greatest drift of units / quota over any interval, times the lesser quota; the share of the first user in
    each window, in %). `reports`: (seconds, units by user since the start); `quotas`: of the two users.
    """
    rows = [(at, units) for at, units in reports if began <= at <= ended]
    first, second = quotas
    drift = [units[first] / quotas[first] - units[second] / quotas[second] for _, units in rows]
    shares, start = [], 0
    for i, (at, units) in enumerate(rows):
        if at - rows[start][0] >= WINDOW:
            gained = {user: units[user] - rows[start][1][user] for user in quotas}
            shares.append(100.0 * gained[first] / sum(gained.values()))
            start = i
    return (max(drift) - min(drift)) * min(quotas.values()), shares
