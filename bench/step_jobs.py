"""Jobs of the optimiser step over P parameters in 8 tensors; bytes: each tensor read or written once."""

from __future__ import annotations

import torch
from job import Job

import entangle_fast as ef

ours = torch.ops.entangle_fast
LR, BETA, DECAY, ALPHA = 1e-3, 0.9, 0.1, 1e-3
COEF = (0.1, 0.2)
BYTES = {"gram": 8, "lookahead": 26, "update": 28, "projected": 16 + 28}  # a parameter, float32
SAMPLES = 64  # elements of each tensor that are compared


class Checked:
    """A call that changes tensors, which all providers share. Its first run starts from what they held at the beginning, at a
    few elements of each (``zeroed``: everywhere, where all elements take part in a sum), and gives the change of those
    elements; later runs give nothing, so that nothing but the step is timed."""

    def __init__(self, run, tensors, start, zeroed=()):
        self.run, self.tensors, self.start, self.zeroed, self.first = run, tensors, start, zeroed, True

    def __call__(self):
        if not self.first:
            self.run(lambda: None)
            return None
        self.first, seen = False, []
        for t in self.zeroed:
            t.zero_()
        for part, value in zip(_few(self.tensors), self.start):
            part.copy_(value)
        self.run(lambda: seen.extend(_copies(self.tensors)))
        return torch.cat([now - then for now, then in zip([*seen, *_copies(self.tensors)], self.start * 2)])


def _few(tensors):
    return [t[:: max(1, len(t) // SAMPLES)] for t in tensors]


def _copies(tensors):
    return [part.clone() for part in _few(tensors)]


def step(P, what):
    """what: "gram" of two directions; "update" with given coefficients; "projected": momentum away from both directions,
    the solve included (ProjectedMomentum.step against the same by _foreach); "lookahead" and its undo."""

    def make(wanted):
        tensors = lambda: [torch.randn(P // 8) for _ in range(8)]  # noqa: E731
        d1, d2 = tensors(), tensors()
        if what == "gram":
            form = {"ours": lambda: ours.step_gram(d1 + d2, 2), "torch": lambda: _pairs_in_double(d1, d2),
                    "foreach": lambda: _foreach_gram(d1, d2)}  # fmt: skip
            return {p: form[p] for p in wanted}
        p, v, g, zeroed = tensors(), tensors(), tensors(), ()
        if what == "lookahead":
            changed, form = p, {"ours": _lookahead(p, g), "foreach": _clones(p, g)}
        elif what == "update":
            changed, form = [*p, *v], {"ours": _update(p, v, g, d1, d2), "foreach": _foreach_update(p, v, g, d1, d2)}
        else:
            torch._foreach_zero_(v)
            zeroed = v
            changed, form = [*p, *v], {"ours": _projected(p, v, g, d1, d2), "foreach": _foreach_projected(p, v, g, d1, d2)}
        start = _copies(changed)
        return {name: Checked(form[name], changed, start, zeroed) for name in wanted}

    providers = ("ours", "foreach", "torch") if what == "gram" else ("ours", "foreach")
    held = 2 if what == "gram" else 5
    more = {"foreach": 4.0 * P} if what == "lookahead" else {"torch": 2.0 * P}
    return Job("step_" + what, dict(P=P), torch.float32, make, providers, 0, BYTES[what] * (P // 8 * 8), slow=P > 3e7,
               memory={"": 4.0 * P * held, "ours": P if what == "lookahead" else 0, **more})  # fmt: skip


def _lookahead(p, g):
    def run(look):
        found = ours.step_lookahead(p, g, ALPHA)
        look()
        ours.step_lookahead_undo(p, g, *found, ALPHA)

    return run


def _clones(p, g):
    def run(look):
        before = [x.clone() for x in p]
        torch._foreach_add_(p, g, alpha=-ALPHA)
        look()
        torch._foreach_copy_(p, before)

    return run


def _update(p, v, g, d1, d2):
    coef = torch.tensor(COEF)

    def run(look):
        ours.step_update(p, v, g, d1 + d2, coef, LR, BETA, DECAY)
        look()

    return run


def _foreach_update(p, v, g, d1, d2):
    def run(look):
        torch._foreach_mul_(v, BETA)
        torch._foreach_add_(v, g)
        for c, d in zip(COEF, (d1, d2)):
            torch._foreach_add_(v, d, alpha=-c)
        torch._foreach_mul_(p, 1 - LR * DECAY)
        torch._foreach_add_(p, v, alpha=-LR)
        look()

    return run


def _projected(p, v, g, d1, d2):
    sgd = ef.optim.ProjectedMomentum(p, lr=LR, momentum=BETA)
    for x, buffer in zip(p, v):  # the peer's: two copies of 1e9 parameters are too many
        sgd.state[x]["momentum_buffer"] = buffer

    def run(look):
        sgd.step(g, [d1, d2])
        look()

    return run


def _foreach_projected(p, v, g, d1, d2):
    def run(look):
        torch._foreach_mul_(v, BETA)
        torch._foreach_add_(v, g)
        gram = _foreach_gram(d1, d2).double()
        rhs = torch.stack([_dot(d1, v), _dot(d2, v)]).double()
        for c, d in zip(torch.linalg.solve(gram, rhs).tolist(), (d1, d2)):
            torch._foreach_add_(v, d, alpha=-c)
        torch._foreach_add_(p, v, alpha=-LR)
        look()

    return run


def _dot(xs, ys):
    return sum(torch.dot(x, y) for x, y in zip(xs, ys))  # there is no _foreach_dot; this makes no temporary


def _foreach_gram(d1, d2):
    one, two = (torch.stack(torch._foreach_norm(d)).square().sum() for d in (d1, d2))
    both = _dot(d1, d2)
    return torch.stack([one, both, both, two]).view(2, 2)


def _pairs_in_double(d1, d2):
    """As the paper's authors do: per-tensor dots in double."""
    dot = lambda xs, ys: sum(torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(xs, ys))  # noqa: E731
    return torch.stack([torch.stack([dot(d1, d1), dot(d1, d2)]), torch.stack([dot(d2, d1), dot(d2, d2)])])


def all_step_jobs() -> list[Job]:
    jobs = [step(P, what) for what in BYTES for P in (10**6, 10**7, 10**8)]
    return jobs + [step(10**9, "projected"), step(10**9, "update")]


def mini_step_jobs() -> list[Job]:
    return [step(8 * 700, what) for what in BYTES]
