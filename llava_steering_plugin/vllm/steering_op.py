"""The update of MoReS on a batch with many adapters: h' = h + R^T (M h + b) (arXiv 2412.12359, eq. 3-4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def steer(
    hidden: Tensor,
    residual: Tensor,
    slots: Tensor,
    chosen: Tensor,
    wanted: Tensor,
    shift: Tensor,
    offset: Tensor,
    basis: Tensor,
    ranks: Tensor,
) -> None:
    """Steer the selected tokens of a layer's output, in place.

    vLLM's layers return the state in two parts, h = hidden + residual. Where it is steered, hidden becomes h' and
    residual 0, which rounds as a layer of transformers does. Tokens are grouped by slot, so that a token costs 4 D
    operations a rank; and nothing is computed where no token is steered, as in decode steps.

    Args:
        hidden, residual: [tokens, D], tokens of all requests one after the other.
        slots: int64 [at least tokens], the slot of the adapter that may steer a token; -1: none does.
        chosen: int64 [at least tokens], bits of the selections that have a token.
        wanted: int64 [slots], the bit of the selection that this layer steers; 0: it steers nothing.
        shift, basis: M and R, float32 [slots, largest rank, D].
        offset: b, float32 [slots, largest rank].
        ranks: int64 [slots]; rows behind are not read.
    """
    count = hidden.shape[0]
    here, bits = slots[:count], chosen[:count]
    if not bool((here >= 0).any()):
        return
    for slot, (bit, rank) in enumerate(zip(wanted.tolist(), ranks.tolist(), strict=True)):
        rows = ((here == slot) & ((bits & bit) != 0)).nonzero().flatten()
        if not len(rows):
            continue
        states = hidden[rows] + residual[rows]
        update = linear(states.float(), shift[slot, :rank], offset[slot, :rank]) @ basis[slot, :rank]
        hidden[rows] = states + update.to(states.dtype)
        residual[rows] = 0
