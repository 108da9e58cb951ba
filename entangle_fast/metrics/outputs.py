"""What a model answers: logits, and what attacks and calibration are made of."""
import torch

from ..methods.training import device_of, in_mode
from ..ops import check


def logits(model, x, y=None, batch_size=1024):
    """Class logits (n, C) float64, on the CPU, of x (n, ...). The model runs in eval mode and is left as found.

    y (n,) int64, where given, is checked against them. Raises ValueError when x is empty, the output is not (n, C), C >= 2,
    or y does not fit; FloatingPointError when logits are not finite.
    """
    check.samples("x", x)
    device, found = device_of(model), []
    with in_mode(model, False), torch.no_grad():
        for batch in x.split(batch_size):
            found.append(model(batch.to(device)).double().cpu())
    out = torch.cat(found)
    if out.dim() != 2 or len(out) != len(x) or out.shape[1] < 2:
        raise ValueError(f"model: gave {tuple(out.shape)} for {len(x)} samples; needs class logits (n, C), C >= 2")
    if not torch.isfinite(out).all():
        raise FloatingPointError("the model's logits are not finite; look for NaN in its weights and in x: a run that "
                                 "diverged needs a smaller lr")
    if y is not None:
        check_labels(out, y)
    return out


def check_labels(out, y):
    """Raise ValueError unless y (n,) int64 are classes of logits `out` (..., n, C)."""
    if y.shape != (out.shape[-2],) or y.dtype != torch.int64:
        raise ValueError(f"y: got {y.dtype} of shape {tuple(y.shape)} for {out.shape[-2]} samples; needs int64 ({out.shape[-2]},)")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < out.shape[-1]:
        raise ValueError(f"y: got labels from {int(y.min())} to {int(y.max())}, needs 0 to {out.shape[-1] - 1}")


def logit_confidence(out, y):
    """φ = log p_y − log(1 − p_y) of logits (..., n, C) and y (n,) → (..., n) float64.

    Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022 [paper], in the form z_y − logsumexp of the
    other logits, which neither p = 0 nor p = 1 makes infinite.
    """
    check_labels(out, y)
    out = out.double()
    own = y.to(out.device).expand(out.shape[:-1]).unsqueeze(-1)
    others = out.scatter(-1, own, -torch.inf).logsumexp(-1)
    return out.gather(-1, own).squeeze(-1) - others
