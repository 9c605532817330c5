"""Token merging (ToMe, Bolya et al. 2023), for the scripts of `speed/` and `timm_budget/`

In every block, after attention, r tokens are averaged into tokens that are like them:

1. Split the tokens into those at even positions (the class token is at 0) and those at odd positions.
2. Each even token finds the odd token that is most like it, by the keys, averaged over heads.
3. The r even tokens that are most like their odd one are averaged into it.

A token that stands for many counts as many in attention.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

def merge_tokens(
    x:Tensor,  # (B, N, D)
    size:Tensor,  # (B, N, 1): how many tokens each one stands for
    keys:Tensor,  # (B, N, d)
    r:int  # tokens to merge away, fewer than half
)->tuple[Tensor, Tensor]:  # x and size of N - r tokens, the remaining even ones first
    "Average the `r` even tokens most like an odd one into it; the class token stays"
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].mT
    similarity[:, 0] = -torch.inf
    best, to = similarity.max(-1)
    order = best.argsort(dim=1, descending=True)
    plan = order[:, r:].sort(dim=1)[0], order[:, :r], to.gather(1, order[:, :r])
    def merge(y):
        stay, go, to = (i[..., None].expand(-1, -1, y.shape[-1]) for i in plan)
        even, odd = y[:, ::2], y[:, 1::2]
        odd = odd.scatter_add(1, to, even.gather(1, go))
        return torch.cat([even.gather(1, stay), odd], 1)
    return merge(x*size)/(merged := merge(size)), merged
