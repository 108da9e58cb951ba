"""Small random programs of torch functions with parameters, in which sizes coincide on purpose: as many positions or features as samples.

A program is Python: t0 is the batch, each line makes a tensor of those before it and of parameters, the last one the losses (n,).
"""

import random
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# x, other: tensors so far.  W(…): a parameter of this shape.  Sizes: few, and of x: last, before (it), second.  at, to: two
# dimensions of x.  order: indices along ``at``.  k: 0, 1 or 2.  Attention's operands are of one shape: torch 2.13 on a CPU takes
# keys and values of different lengths and writes past its memory.
STEPS = """
F.linear(x, W(few, last), W(few))
F.linear(x, W(few, last), W(1))
F.linear(x, W(last, last)).tanh() @ W(last, last)
F.linear(x, W(2, last) @ W(last, last))
F.linear(x, F.normalize(W(few, last), dim=1))
F.linear(x, W(4, last)[1:3])
x @ W(last, few)
W(few, before) @ x
x @ W(last)
torch.addmm(W(few), x, W(last, few))
torch.addmm(W(few, 1), W(few, before), x)
torch.baddbmm(W(last), x, W(last, last).expand(x.shape[0], -1, -1))
torch.tensordot(x, W(few, last), ([-1], [1]))
torch.inner(W(few, last), x)
torch.linalg.vecdot(x, W(last))
torch.einsum('ab,cb->ac', x, W(few, last))
torch.einsum('abc,dc->adb', x, W(few, last))
torch.einsum('abc,db->dac', x, W(few, before))
(x @ W(last, last) * x).sum(-1)
x + W(last)
x * W(before, 1)
x.unsqueeze(-1) * W(few)
torch.where(x > 0, x, W(last))
torch.lerp(x, W(last).expand_as(x), 0.3)
torch.cat([W(1, 1, last).expand(x.shape[0], -1, -1), x], 1)
F.embedding((x.detach() > 0).long(), W(few, few))
x + F.embedding(torch.arange(before), W(4, last))
F.layer_norm(x, (last,), W(last), W(last))
F.layer_norm(x, (before, last), W(before, last))
F.rms_norm(x, (last,), W(last))
F.instance_norm(x.unsqueeze(-1) * torch.arange(3.0).double(), None, None, W(second))
F.prelu(x, W(second))
F.conv1d(x, W(few, before, 2), W(few), padding=1)
F.conv1d(x, W(before, 1, 2), stride=2, padding=1, groups=before)
F.conv2d(x, W(2, x.shape[-3], 2, 2), padding=1)
F.scaled_dot_product_attention(x, x, x, is_causal=True)
F.scaled_dot_product_attention(x, x @ W(last, last), x.flip(at))
x.tanh()
x.clone().mul_(0.5).sin_()
x.detach() + x * 0.5
x.transpose(at, to)
x.movedim(at, to)
x.flip(at, to)
x.mT
x.flatten(k, k + 1)
x.reshape(-1, last)
x.reshape(x.shape[::-1])
x.reshape(other.shape)
x.unflatten(at, (-1, 1))
x.unflatten(at, (2, -1))
x.unsqueeze(k)
x.squeeze(at)
x.expand(few, *x.shape)
x.repeat_interleave(2, at)
x.tile(2)
x.sum(at)
x.amax((at, to))
x.logsumexp(at, True)
x.var(at)
x.median(at)[0]
x.softmax(at)
x.cumsum(at)
x.sort(at)[0]
x.roll(1, at)
F.normalize(x, dim=at)
F.cosine_similarity(x, other, dim=at)
torch.quantile(x, torch.tensor([0.2, 0.5, 0.7]).double(), at)
x.select(at, 0)
x.narrow(at, k, 1)
x[:, 1:]
x[..., 0]
x[:, None]
x[:, 0, ..., order]
x[:, order]
x[torch.arange(len(x)), order]
x[..., x.detach().flatten(0, -2).amax(0) > 0.1]
x.index_select(at, order)
x.gather(at, x.detach().argsort(at))
x.take_along_dim(x.detach().argsort(at), at)
x.clone().index_copy_(at, order, x)
torch.zeros_like(x).index_add(at, order, x)
torch.select_scatter(x, x.select(at, 0) * 2, at, 0)
x.chunk(2, at)[0]
x.unbind(at)[k]
x.diagonal(0, at, to)
x.diag_embed(0, at, to)
x.unfold(at, 2, 1)
x.tril()
F.pad(x, (1, 0))
F.pad(x, (0, 0, 1, 0))
F.avg_pool1d(x, 2, 1)
F.glu(x, at)
torch.cat([x, other], at)
torch.stack([x, other], at)
torch.vstack([x, other])
x + other
x * other
x @ other
x @ other.mT
torch.bmm(x, other.mT)
torch.cdist(x, other)
torch.einsum('ab,ab->a', x, other)
torch.einsum('abc,adc->abd', x, other)
torch.einsum('abc,cbd->abd', x, other)
torch.stack([row * W(last) for row in x])
""".strip().splitlines()


class Program(nn.Module):
    """Drawn by ``seed``; text: what it does.  forward(x): the losses.  Of one that cannot be drawn, drawn is False."""

    def __init__(self, seed: int):
        super().__init__()
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.n = self.random.choice((2, 3, 3, 4))
        self.batch_dim = self.random.choice((0,) * 6 + (1,))
        sizes = [self.random.choice((self.n, self.n, 2, 3)) for _ in range(self.random.choice((1 + self.batch_dim, 2, 3)))]
        sizes.insert(self.batch_dim, self.n)
        self.x = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        self.weights, self.checkpointed, self._lines = nn.ParameterDict(), False, []
        self._draw(self.random.choice((2, 3, 4, 6)))

    @property
    def text(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self.weights.items()}
        lines = [f"t{k} = {line}" for k, (line, _) in enumerate(self._lines, 1)]
        return "\n".join([f"t0: {tuple(self.x.shape)}, samples in dimension {self.batch_dim}; parameters: {shapes}", *lines])

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for k, (_, code) in enumerate(self._lines):
            again = self.checkpointed and k % 3
            tensors.append(checkpoint(self._run, code, *tensors, use_reentrant=False) if again else self._run(code, *tensors))
        return tensors[-1]

    def _run(self, code, *tensors: Tensor) -> Tensor:
        return eval(code, {"torch": torch, "F": F, **dict(self.weights), **{f"t{k}": t for k, t in enumerate(tensors)}})

    def _draw(self, steps: int) -> None:
        """Lines that run, more often such that the samples stay apart: a sample of NaN shows which entries are made of it."""
        each = [[self.x.index_fill(self.batch_dim, torch.tensor([i]), float("nan"))] for i in range(self.n)]
        tensors, self._axes = [self.x], [self.batch_dim]
        for _ in range(8 * steps):
            before = len(self.weights)
            try:
                line = self._line(tensors)
                code = compile(line, "<program>", "eval")
                y = self._run(code, *tensors)
                assert 0 < y.dim() < 5 and 0 < y.numel() < 2000 and y.dtype == torch.float64 and y.isfinite().all() and y.abs().max() < 1e3
                with torch.no_grad():
                    made = [self._run(code, *t) for t in each]
                axis = _samples([z.isnan() for z in made])
                assert axis is not None or self.random.random() < 0.7
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                for name in list(self.weights)[before:]:
                    del self.weights[name]
                continue
            tensors.append(y)
            self._lines.append((line, code))
            self._axes.append(axis)
            for t, z in zip(each, made):
                t.append(z)
            if len(self._lines) == steps:
                break
        y, axis = tensors[-1], self._axes[-1]
        places = [d for d, size in enumerate(y.shape) if size == self.n]
        self.drawn = bool(self.weights and places and y.requires_grad)
        if self.drawn:
            axis = axis if axis in places and self.random.random() < 0.9 else self.random.choice(places)
            line = f"t{len(self._lines)}.square().movedim({axis}, 0).reshape({self.n}, -1).sum(1)"
            self._lines.append((line, compile(line, "<program>", "eval")))

    def _line(self, tensors: list[Tensor]) -> str:
        which = len(tensors) - 1 if self.random.random() < 0.75 else self.random.randrange(len(tensors))
        x, dims = tensors[which], list(range(tensors[which].dim()))
        self.random.shuffle(dims)
        if self._axes[which] in dims and self.random.random() < 0.5:  # less often along the samples
            dims.sort(key=lambda d: d == self._axes[which])
        at, to = dims[0], dims[1 % len(dims)]
        sizes = {"few": self.random.choice((2, 3, 4)), "last": x.shape[-1], "before": x.shape[max(-2, -x.dim())],
                 "second": x.shape[min(1, x.dim() - 1)]}  # fmt: skip
        order = [self.random.randrange(x.shape[at]) for _ in range(x.shape[at])]
        words = {"x": f"t{which}", "other": f"t{self.random.randrange(len(tensors))}", "at": at, "to": to, "k": self.random.randrange(3),
                 "order": f"torch.tensor({order})", **sizes}  # fmt: skip
        line = self.random.choice(STEPS)
        line = re.sub(r"W\(([^()]*)\)", lambda found: self._weight(eval(f"({found[1]},)", {"x": x}, sizes)), line)
        return re.sub(r"\b(?<!\.)[a-z]+\b(?!=)", lambda found: str(words.get(found[0], found[0])), line)

    def _weight(self, shape: tuple) -> str:
        same = [name for name, p in self.weights.items() if tuple(p.shape) == shape]
        if same and self.random.random() < 0.3:  # tied
            return self.random.choice(same)
        name = f"p{len(self.weights)}"
        self.weights[name] = nn.Parameter(torch.randn(shape, generator=self.generator, dtype=torch.float64) / 2)
        return name


def _samples(masks: list[Tensor]) -> int | None:
    """The dimension whose entry i is marked in the i-th mask and in no other."""
    n = len(masks)
    for d, size in enumerate(masks[0].shape):
        if size == n and all(bool((m.movedim(d, -1) == (torch.arange(n) == i)).all()) for i, m in enumerate(masks)):
            return d
    return None
