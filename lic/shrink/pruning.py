"""Structured pruning: which channels matter, what stays of those that go, and the cut.

Which tensors a channel lives in is written in codec/structure.py.
"""

import torch

from lic.codec import structure
from lic.codec.gdn import GDN
from lic.codec.model import Codec
from lic.shrink.statistics import best_prediction, observe

SWEEPS = 30  # over the coefficients of a GDN that is fitted anew


@torch.no_grad()
def narrow(model, keep, statistics=None):
    """A new Codec that has only the channels keep = {group: rising indices (width,)}.

    Groups that are not named stay whole. statistics, from `statistics.observe`: the channels that
    stay take over what they can predict of the removed ones; without it those count as zeros.
    """
    state, widths = model.state_dict(), model.config["widths"]
    if statistics:
        for group, indices in keep.items():  # all before the first cut: a fold reads whole weights
            if len(indices) == widths[group]:
                continue
            fold_into_readers(model, state, group, indices, statistics)
            if group in statistics.gdn_products:
                fold_into_gdn(model, state, group, indices, statistics)
    for group, indices in keep.items():
        for name, axis, copies in structure.axes_of_group(model, group):
            kept = torch.cat([indices + copy * widths[group] for copy in range(copies)])
            state[name] = state[name].index_select(axis, kept)
    widths = widths | {group: len(indices) for group, indices in keep.items()}
    with torch.device("meta"):  # without weights: all are copied
        narrowed = Codec(model.config | {"widths": widths})
    copies = {name: tensor.clone() for name, tensor in state.items()}
    narrowed.load_state_dict(copies, assign=True)
    return narrowed.to(memory_format=torch.channels_last).eval()


def best_cut(model, keep, x, loss):
    """`narrow` with or without the fold, whichever has the lower J on the images x (B, 3, H, W).

    loss: (codec, x) -> J of each level, (levels,). Returns the codec and
    {"not folded": J, "folded": J}, geometric means over the levels.
    """
    codecs = {
        "not folded": narrow(model, keep),
        "folded": narrow(model, keep, observe(model, x)),
    }
    J = {how: loss(codec, x).log().mean().exp().item() for how, codec in codecs.items()}
    return codecs[min(J, key=J.get)], J


def removed(width, keep):
    """The other indices of range(width)."""
    stays = torch.zeros(width, dtype=torch.bool)
    stays[keep] = True
    return (~stays).nonzero()[:, 0]


def fold_into_readers(model, state, group, keep, statistics):
    """Let the layers that read `group` compute the removed channels from those that stay, in state.

    The best linear prediction of the removed channels, over all positions, is

        x_gone ~ B x_keep + c

    With it a reader's output is a function of the others alone, of other weights and another bias
    (but at the borders, where the padding is 0 and not c):

        W_keep x_keep + W_gone x_gone ~ (W_keep + W_gone B) x_keep + W_gone c

    He, Zhang, Sun, "Channel pruning for accelerating very deep neural networks", arXiv:1707.06168,
    reconstruct the reader's output by least squares; here its input is, which needs no more than
    one covariance a layer.
    """
    gone = removed(model.config["widths"][group], keep)
    for name in structure.groups()[group].used_by:
        reader = model.get_submodule(name)
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        B, c = best_prediction(statistics.inputs[name], keep, gone)
        B, c = B.to(bias), c.to(bias)
        out_axis, _ = structure.channel_axes(reader)
        weight = weight.transpose(0, out_axis).clone()  # (out, in, k, k)
        # of a transposed convolution a pixel meets one tap in stride^2, on average
        share_met = 1 / reader.stride[0] ** 2 if reader.transposed else 1
        state[f"{name}.bias"] = bias + share_met * weight[:, gone].sum((2, 3)) @ c
        weight[:, keep] += torch.einsum("ogij,gk->okij", weight[:, gone], B)
        state[f"{name}.weight"] = weight.transpose(0, out_axis)


def fold_into_gdn(model, state, group, keep, statistics):
    """Fit beta and gamma of the GDN of `group` anew, in state, to the channels that stay.

    Channel i is divided by the root of e_i = beta_i + sum_j gamma[i, j] x_j^2 (IGDN: multiplied),
    and the sum is over channels that go, too. f_i, of the same form, may use only those that stay,
    and of all f_i without a negative coefficient it is the one of the least

        sum over the positions of x_i^2 ((f_i - e_i) / e_i)^2

    Errors are relative, since they change the output y_i by dy_i / y_i = -+ de_i / 2 e_i. (That
    would weigh them by y_i^2; x_i^2 gave a lower J, see docs/notebook/pruning.md.) Energies span
    many octaves: if the errors were not relative, the few loud positions would decide, and f_i be
    many times too large at the others.

    Solved for all i at once by coordinate descent from the old coefficients on (Franc, Hlaváč,
    Navara, "Sequential coordinate-wise algorithm for the non-negative least squares problem",
    CAIP 2005).
    """
    gdn = structure.groups()[group].gdn
    beta, gamma = model.get_submodule(gdn).coefficients()
    old = torch.cat([gamma, beta[:, None]], 1)[keep].double()  # (kept, C + 1)
    columns = torch.cat([keep, torch.tensor([len(gamma)])])  # those of the kept x_j^2, and beta's
    products = statistics.gdn_products[group][keep][:, columns]  # (kept, kept + 1, C + 1)
    A = products[:, :, columns]  # the normal equations of row i: A[i] fitted[i] = b[i]
    b = (products @ old[:, :, None])[:, :, 0]
    fitted = old[:, columns]  # (kept, kept + 1)
    for _ in range(SWEEPS):
        for j in range(len(columns)):
            slope = (A[:, j] * fitted).sum(1) - b[:, j]
            curvature = A[:, j, j].clamp(min=1e-300)  # 0 for a dead channel, which moves nothing
            fitted[:, j] = (fitted[:, j] - slope / curvature).clamp(min=0)
    fitted = fitted.to(gamma)
    beta[keep] = fitted[:, -1]
    gamma[keep[:, None], keep] = fitted[:, :-1]
    state[f"{gdn}.beta"] = GDN.stored(beta)
    state[f"{gdn}.gamma"] = GDN.stored(gamma)


def importance(model, statistics, measure="residual"):
    """How much a channel matters, {group: (width,)}, by one of two measures:

    residual  its rank in a backward elimination, see `residual`: what the others cannot replace
              goes last
    l1        L1 norm of the weights that make it (Li et al., "Pruning filters for efficient
              ConvNets", arXiv:1608.08710): what is used most, and blind to what GDN does after

    Raises ValueError for another measure.
    """
    if measure == "residual":
        return residual(model, statistics)
    if measure == "l1":
        scores = {}
        for name, group in structure.groups().items():
            weights = structure.weight_rows(model.get_submodule(group.made_by))
            scores[name] = weights.abs().sum(1)
        return scores
    raise ValueError(measure)


def residual(model, statistics):
    """Backward elimination: the rank in which the channels of a group can go, {group: (width,)}.

    In each round the channel goes whose best prediction from those that are left costs its first
    reader least: |W_c|^2 / P_cc, where P is the inverse covariance of what is left and 1 / P_cc the
    variance that the others cannot predict. The "optimal brain surgeon" of a linear layer (Hassibi
    and Stork, NIPS 1992), a channel at a time.
    """
    ranks = {}
    for name, group in structure.groups().items():
        first_reader = group.used_by[0]
        reader = model.get_submodule(first_reader)
        covariance = statistics.inputs[first_reader].covariance()
        width = len(covariance)
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12
        P = torch.linalg.inv(covariance + ridge * torch.eye(width, dtype=covariance.dtype))
        _, in_axis = structure.channel_axes(reader)
        squares = reader.weight.detach().double().square()
        strength = squares.transpose(0, in_axis).sum((1, 2, 3))  # |W_c|^2, (width,)
        ranks[name] = torch.zeros(width)
        left = torch.ones(width, dtype=torch.bool)
        for rank in range(width):
            c = torch.where(left, strength / P.diagonal(), torch.inf).argmin()
            ranks[name][c] = rank
            left[c] = False
            # the inverse covariance without c; its row and column become 0
            P = P - P[:, c, None] * P[c] / P[c, c]
            P[c, c] = 1
    return ranks


def most_important(scores, width):
    """Indices of the `width` highest scores, rising: (width,)."""
    return scores.topk(width).indices.sort().values
