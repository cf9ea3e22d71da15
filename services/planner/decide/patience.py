"""After how many tokens each card of a route is cut off: what the knowledge owner learned of that, at a query's prices.

Pure. Only where what is cut off can be followed up: something is expected of the answer, and another card may be asked.
A card has no limit where energy has no price and cutting off gains no score.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence

from shared import messages as m
from shared.learn.live_patience import Table

FREE = 5
"""One query in so many has no limits: from those it is learned what answers would have been."""


def limits(
    query: m.Query, query_id: str, policy: m.Policy, standing: Sequence[m.Candidate], tables: Mapping[str, Table],
    weights: Mapping[str, float], cards: Mapping[str, m.Card],
) -> dict[str, int]:  # fmt: skip
    """Output tokens by card, of those in `standing` (the route's order) that have a limit.

    A token costs what the attempt does per expected token, the prompt included; another attempt what the next card's
    does. Both in units of score: w_e / w_q of joules over the reference.
    """
    retries = policy.retries if query.retries is None else query.retries
    if not tables or retries < 1 or len(standing) < 2 or weights["w_q"] <= 0.0:
        return {}
    if zlib.crc32(query_id.encode()) % FREE == 0:
        return {}
    price = weights["w_e"] / weights["w_q"] / policy.energy_ref_j
    found: dict[str, int] = {}
    for candidate, following in itertools.pairwise(standing):
        table = tables.get(candidate.card)
        if table is None or (query.expect is None and cards[candidate.card].expect is None):
            continue
        token_j = candidate.energy_j / max(candidate.terms.get("tokens_out", 0.0), 1.0)
        limit = table.limit(price * token_j, price * following.energy_j)
        if limit is not None:
            found[candidate.card] = limit
    return found
