"""One call of every operation, by schema name: positional arguments for torch.ops.entangle_fast.*."""

import torch

import entangle_fast  # noqa: F401  registers them

N, T, I, O = 5, 3, 6, 4


def arguments(dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(0)

    def r(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    def ids(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    conv = lambda: (r(N, 4, 7), r(N, 6, 3))  # noqa: E731
    shape = ([3], [2], [0], [1], 2)
    loss = (1.5, 0.1, -100, 0.05, "mean")
    plain = lambda t: t.detach().clone()  # noqa: E731
    logits, target, h, weight, bias = r(N, T, 7), ids(7, N, T), r(N, T, I), r(7, I), r(7)
    stats = torch.ops.entangle_fast.sample_loss(logits.detach(), target, *loss)[1:]
    fused = torch.ops.entangle_fast.linear_sample_loss(h.detach(), weight.detach(), bias.detach(), target, *loss)[1:]
    lists = [[plain(r(3, 4)), plain(r(5))] for _ in range(4)]
    ahead = [[p.clone() for p in lists[0]], lists[1], 0.1]
    residue = torch.ops.entangle_fast.step_lookahead(*ahead)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    moments = [[torch.full_like(p, x, dtype=acc) for p in lists[0]] for x in (0.1, 0.2)]
    return {
        "gram": (r(N, T, I), r(N, T, O), None, None, "tiles"),
        "gram_layers": ([r(N, I), r(N, 3)], [r(N, O), r(N, 2)], [r(2, I), r(2, 3)], [r(2, O), r(2, 2)]),
        "gram_conv": (*conv(), *shape, None, None, "tiles"),
        "gram_embedding": (ids(9, N, T), r(N, T, O), None, None, 2),
        "sqnorm": (r(N, T, I), r(N, T, O)),
        "sqnorm_conv": (*conv(), *shape),
        "sqnorm_embedding": (ids(9, N, T), r(N, T, O), 2),
        "project": (r(N, T, I), r(N, T, O), r(2, O, I)),
        "project_conv": (*conv(), r(2, 6, 2, 3), *shape[1:]),
        "project_embedding": (ids(9, N, T), r(N, T, O), r(2, 9, O), 2),
        "project_random": (plain(r(N, T, I)), plain(r(N, T, O)), 3, 7, 1, "sign"),
        "project_random_conv": (*map(plain, conv()), 3, *shape, 7, 1, "gaussian"),
        "project_random_embedding": (ids(9, N, T), plain(r(N, T, O)), 3, 9, 7, 1, "sign", 2),
        "combine": (r(N, T, I), r(N, T, O), r(2, N)),
        "combine_conv": (*conv(), r(2, N), *shape),
        "combine_embedding": (ids(9, N, T), r(N, T, O), r(2, N), 9, 2),
        "sample_loss": (logits, target, *loss),
        "sample_loss_backward": (torch.ones(N, dtype=acc), plain(logits), target, *stats, *loss),
        "linear_sample_loss": (h, weight, bias, target, *loss),
        "linear_sample_loss_backward": (torch.ones(N, dtype=acc), plain(h), plain(weight), plain(bias), target, *fused, *loss),
        "w2_sorted": (r(N), plain(r(7))),
        "w2_moments": (r(N), plain(r(7))),
        "w2_features": (r(N, 3), plain(r(7, 3))),
        "step_gram": ([*lists[0], *lists[1]], 2),
        "step_project": (lists[0] + lists[1], lists[2], lists[3], 0.9, 0.0, 1e-15),
        "step_update": (lists[0], lists[1], lists[2], lists[3], torch.ones(1), 0.1, 0.9, 0.01, 0.1, 3, 1, torch.tensor(2)),
        "step_adamw": (lists[0], *moments, lists[2], lists[3], torch.ones(1), torch.tensor(2), 0.1, 0.9, 0.999, 1e-8, 0.01, 0.1, 3, 1),
        "step_lookahead": (lists[0], lists[1], 0.1),
        "step_lookahead_undo": ([p.clone() for p in ahead[0]], lists[1], *residue, 0.1),
    }


OPS = list(arguments())
