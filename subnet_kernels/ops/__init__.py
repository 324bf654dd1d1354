"""The ops: per op one file with the public function, its checks, schema, fake and autograd.

The one legend of letters, for this folder and every kernel:

- linear: ``x [M, K]`` (any leading dimensions), ``weight [N, K]``, ``bias [N]`` -> ``out [M, N]``
- conv: ``x [B, C, H, W]``, ``weight [O, C/groups, KH, KW]``, ``bias [O]`` -> ``out [B, O, OH, OW]``
- ``scores``: weight's number of dimensions, each size divides weight's; ``beta``: 0-d; ``m``: the mask
- ``w_eff = (weight.float() * m).to(compute dtype)``: the one place of rounding
- ``penalty``: sum of m over weights, 0-d fp32 (a coarse score counts once for every weight that it governs)
- ``slope = dm/ds``, ``ds = sum over the score's weights of grad_w_eff*weight*slope + grad_penalty*penalty_slope``
"""
