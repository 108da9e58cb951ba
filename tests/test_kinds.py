"""Lists, numbers, None, numpy arrays and strings where tensors are needed: an error that names the argument, everywhere."""

import math

import numpy as np
import pytest
import torch
from small import net

import entangle_fast as ef
from entangle_fast import metrics, ops, optim, tasks, weights
from entangle_fast.methods.training import fit
from entangle_fast.metrics.utility import calibration_error

N, C = 4, 3


def r(*shape):
    return torch.randn(shape)


ids, y = torch.zeros(N, 3, dtype=torch.int64), torch.arange(N) % C
p = lambda: [r(2), r(3, 2)]  # noqa: E731
model = torch.nn.Linear(5, C)
pixels = torch.zeros(N, 1, 4, 4, dtype=torch.uint8)

# function, keyword arguments that serve, and those of them that must be tensors
CALLS = {
    "gram": (ops.gram, lambda: dict(a=r(N, 3), b=r(N, 2), a2=r(2, 3), b2=r(2, 2)), "a b a2 b2"),
    "gram_layers": (ops.gram_layers, lambda: dict(layers=[(r(N, 3), r(N, 2))], others=[(r(2, 3), r(2, 2))]), "layers others"),
    "gram_conv": (ops.gram_conv, lambda: dict(x=r(N, 2, 5), g=r(N, 3, 3), kernel_size=3, x2=r(2, 2, 5), g2=r(2, 3, 3)), "x g x2 g2"),
    "gram_embedding": (ops.gram_embedding, lambda: dict(ids=ids, b=r(N, 3, 2), ids2=ids, b2=r(N, 3, 2)), "ids b ids2 b2"),
    "sqnorm": (ops.sqnorm, lambda: dict(a=r(N, 3), b=r(N, 2)), "a b"),
    "sqnorm_conv": (ops.sqnorm_conv, lambda: dict(x=r(N, 2, 5), g=r(N, 3, 3), kernel_size=3), "x g"),
    "sqnorm_embedding": (ops.sqnorm_embedding, lambda: dict(ids=ids, b=r(N, 3, 2)), "ids b"),
    "project": (ops.project, lambda: dict(a=r(N, 3), b=r(N, 2), basis=r(1, 2, 3)), "a b basis"),
    "project_conv": (ops.project_conv, lambda: dict(x=r(N, 2, 5), g=r(N, 3, 3), basis=r(1, 3, 2, 3)), "x g basis"),
    "project_embedding": (ops.project_embedding, lambda: dict(ids=ids, b=r(N, 3, 2), basis=r(1, 5, 2)), "ids b basis"),
    "project_random": (ops.project_random, lambda: dict(a=r(N, 3), b=r(N, 2), k=2, seed=0), "a b"),
    "project_random_conv": (ops.project_random_conv, lambda: dict(x=r(N, 2, 5), g=r(N, 3, 3), k=2, kernel_size=3, seed=0), "x g"),
    "project_random_embedding": (ops.project_random_embedding, lambda: dict(ids=ids, b=r(N, 3, 2), k=2, num_embeddings=5, seed=0), "ids b"),
    "combine": (ops.combine, lambda: dict(a=r(N, 3), b=r(N, 2), w=r(2, N)), "a b w"),
    "combine_conv": (ops.combine_conv, lambda: dict(x=r(N, 2, 5), g=r(N, 3, 3), w=r(1, N), kernel_size=3), "x g w"),
    "combine_embedding": (ops.combine_embedding, lambda: dict(ids=ids, b=r(N, 3, 2), w=r(1, N), num_embeddings=5), "ids b w"),
    "sample_loss": (ops.sample_loss, lambda: dict(logits=r(N, C), target=y), "logits target"),
    "linear_sample_loss": (ops.linear_sample_loss, lambda: dict(h=r(N, 5), weight=r(C, 5), target=y, bias=r(C)), "h weight target bias"),
    "w2_sorted": (ops.w2_sorted, lambda: dict(losses=r(N), reference=r(3)), "losses reference"),
    "w2_moments": (ops.w2_moments, lambda: dict(losses=r(N), reference=r(3)), "losses reference"),
    "w2_features": (ops.w2_features, lambda: dict(features=r(N, 2), reference=r(3, 2)), "features reference"),
    "step_gram": (ops.step_gram, lambda: dict(directions=[p(), p()]), "directions"),
    "step_project": (ops.step_project, lambda: dict(directions=[p()], momentum=p(), grads=p()), "directions momentum grads"),
    "step_update": (ops.step_update, lambda: dict(params=p(), momentum=p(), grads=p(), directions=[p()], coef=r(1), lr=0.1),
                    "params momentum grads directions coef"),
    "step_adamw": (ops.step_adamw, lambda: dict(params=p(), exp_avg=p(), exp_avg_sq=p(), grads=p(), directions=[p()], coef=r(1),
                                                step=torch.tensor(1), lr=0.1),
                   "params exp_avg exp_avg_sq grads directions coef step"),
    "step_lookahead": (ops.step_lookahead, lambda: dict(params=p(), grads=p(), alpha=0.1), "params grads"),
    "means": (weights.means, lambda: dict(losses=r(N)), "losses"),
    "clipped": (weights.clipped, lambda: dict(losses=r(N), clip=1.0), "losses"),
    "clipped_norms": (weights.clipped_norms, lambda: dict(sqnorms=r(N), bound=1.0), "sqnorms"),
    "lagrangian": (weights.lagrangian, lambda: dict(forget=r(N), remote=r(N), remote_start=r(), multiplier=r()),
                   "forget remote multiplier"),
    "w2": (weights.w2, lambda: dict(values=r(N), reference=r(3)), "values reference"),
    "pcgrad": (weights.pcgrad, lambda: dict(gram=torch.eye(2)), "gram"),
    "upgrad": (weights.upgrad, lambda: dict(gram=torch.eye(2), preference=torch.ones(2)), "gram preference"),
    "solve": (weights.solve, lambda: dict(gram=torch.eye(2), rhs=r(2)), "gram rhs"),
    "project_onto": (weights.project_onto, lambda: dict(gram=torch.eye(2), cross=r(2, N), u=r(N)), "gram cross u"),
    "project_away": (weights.project_away, lambda: dict(gram=torch.eye(2), cross=r(2, N), u=r(N)), "gram cross u"),
    "damped": (weights.damped, lambda: dict(gram=torch.eye(2), cross=r(2, N), u=r(N), damping=1.0), "gram cross u"),
    "ProjectedMomentum": (optim.ProjectedMomentum, lambda: dict(params=p(), lr=0.1), "params"),
    "momentum.step": (optim.ProjectedMomentum(p(), lr=0.1).step, lambda: dict(grads=p(), directions=[p()], coef=r(1)),
                      "grads directions coef"),
    "ProjectedAdamW": (optim.ProjectedAdamW, lambda: dict(params=p()), "params"),
    "adamw.step": (optim.ProjectedAdamW(p()).step, lambda: dict(grads=p(), directions=[p()], coef=r(1)), "grads directions coef"),
    "decay_noise_step": (optim.decay_noise_step, lambda: dict(params=p(), grads=p(), lr=0.1), "params grads"),
    "predict": (metrics.predict, lambda: dict(model=model, data=r(N, 5)), "data"),
    "accuracy": (metrics.accuracy, lambda: dict(model=model, data=(r(N, 5), y)), "data"),
    "gradient_angle": (metrics.gradient_angle, lambda: dict(model=model, forget=(r(N, 5), y), retain=(r(N, 5), y)), "forget retain"),
    "sample_losses": (metrics.sample_losses, lambda: dict(model=model, data=(r(N, 5), y)), "data"),
    "loss_distribution": (metrics.loss_distribution, lambda: dict(losses=r(N)), "losses"),
    "membership": (metrics.membership, lambda: dict(model=model, members=(r(N, 5), y), nonmembers=(r(N, 5), y), attacks=("loss",)),
                   "members nonmembers"),
    "relearn": (metrics.relearn, lambda: dict(model=model, original=model, forget=(r(N, 5), y), steps=1, seeds=1, progress=False),
                "forget"),
    "by_label": (tasks.by_label, lambda: dict(fine=y, forget=[0], superclass_of=torch.zeros(C, dtype=torch.int64)), "fine superclass_of"),
    "by_knn": (tasks.by_knn, lambda: dict(embed_forget=r(N, 2), embed_retain=r(N, 2), k=2), "embed_forget embed_retain"),
    "agreement": (tasks.agreement, lambda: dict(indices=torch.arange(2), adjacent=torch.ones(3, dtype=torch.bool)), "indices adjacent"),
    "embed": (tasks.embed, lambda: dict(model=model, data=r(N, 5)), "data"),
    "split_by_knn": (tasks.split_by_knn, lambda: dict(model=model, forget=(r(N, 5), y), retain=(r(N, 5), y)), "forget retain"),
    "ImageClasses": (tasks.ImageClasses, lambda: dict(train_x=pixels, train_y=y, test_x=pixels, test_y=y, class_names=list("abc"),
                                                      forget="a", labels="fine"), "train_x train_y test_x test_y"),
}  # fmt: skip
EVERY = [(name, argument) for name, (_, _, arguments) in CALLS.items() for argument in arguments.split()]
OPTIONAL = {"a2", "b2", "x2", "g2", "ids2", "bias", "others", "momentum", "preference", "u"}
SERVED = {("lagrangian", "multiplier", "number"), ("momentum.step", "coef", "None"),
          ("adamw.step", "coef", "None")}  # fmt: skip
WRONG = {
    "list": [1.0, 2.0], "nested": [[1.0], [2.0]], "None": None, "number": 1.5, "array": np.ones((N, 3), dtype=np.float32), "string": "x",
}  # fmt: skip


def test_the_calls_serve():
    for name, (call, arguments, _) in CALLS.items():
        assert all(a in arguments() for a in CALLS[name][2].split())
        call(**arguments())
    public = {n for room in (ops, weights) for n in room.__all__} - {"step_lookahead_undo"}
    assert public <= CALLS.keys()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name, argument", EVERY)
def test_what_is_no_tensor(name, argument, wrong):
    call, arguments, _ = CALLS[name]
    given = {**arguments(), argument: WRONG[wrong]}
    if (wrong == "None" and argument in OPTIONAL) or (name, argument, wrong) in SERVED:
        return
    with pytest.raises((TypeError, ValueError)) as error:
        call(**given)
    assert str(error.value).startswith(argument), str(error.value)
    assert "need" in str(error.value)


GENERATED = [(name, argument) for name, argument in EVERY if isinstance(CALLS[name][1]()[argument], (list, tuple))]


def once(x):
    return (once(y) if isinstance(y, (list, tuple)) else y for y in x)


@pytest.mark.parametrize("name, argument", GENERATED)
def test_generators_are_served_or_named(name, argument):
    """As a whole, and as an entry of a list; a model's parameters() are one."""
    call, arguments, _ = CALLS[name]
    lists = arguments()[argument]
    for given in (once(lists), [once(x) for x in lists] if isinstance(lists[0], (list, tuple)) else map(torch.clone, lists)):
        try:
            call(**{**arguments(), argument: given})
        except (TypeError, ValueError) as error:
            assert str(error).startswith(argument) and "need" in str(error), str(error)


TENSORS = {
    "integers": torch.ones(N, 3, dtype=torch.int64), "0-d": torch.tensor(1.0), "empty": torch.zeros(0),
    "of NaN": torch.full((N,), math.nan),
}  # fmt: skip


@pytest.mark.parametrize("wrong", TENSORS)
@pytest.mark.parametrize("name, argument", EVERY)
def test_odd_tensors_are_served_or_named(name, argument, wrong):
    """Nothing else than an error that says which argument, or a result."""
    call, arguments, _ = CALLS[name]
    try:
        call(**{**arguments(), argument: TENSORS[wrong]})
    except RuntimeError as error:  # of the model, which does not take such samples
        assert argument == "data" and "mat1" in str(error)
    except (TypeError, ValueError, FloatingPointError) as error:
        assert any(a in str(error).split(":")[0] for a in arguments()) or isinstance(error, FloatingPointError), str(error)


def test_models_and_numbers():
    with pytest.raises(TypeError, match=r"^model: got dict; needs a torch.nn.Module"):
        metrics.predict({}, r(N, 5))
    with pytest.raises(TypeError, match="^ridge: got str; needs a number"):
        weights.solve(torch.eye(2), r(2), ridge="1")
    with pytest.raises(TypeError, match="^sets: got list; needs a tasks.Sets"):
        metrics.evaluate(net(), [])
    with pytest.raises(TypeError, match=r"^a: got numpy.ndarray; needs a torch.Tensor: torch.from_numpy"):
        ops.gram(np.ones((4, 3)), r(4, 2))
    with pytest.raises(TypeError, match=r"^params\[1\]: got float"):
        ops.step_lookahead([r(2), 1.0], p(), 0.1)
    with pytest.raises(TypeError, match="missing 1 required"):
        ops.gram(r(4, 3))


# True would serve as 1: named wherever a number is meant, though the call would succeed
BOOLEANS = {
    **{f"{call}, {name}": (name, lambda call=call, name=name: CALLS[call][0](**{**CALLS[call][1](), name: True}))
       for call, names in {
           "project_random": "k seed offset", "project_random_conv": "k seed offset groups kernel_size stride",
           "project_random_embedding": "k seed offset num_embeddings padding_idx", "gram_embedding": "padding_idx",
           "gram_conv": "groups kernel_size stride padding dilation", "sqnorm_conv": "groups stride", "combine_conv": "groups padding",
           "combine_embedding": "num_embeddings padding_idx", "sample_loss": "ignore_index clip", "linear_sample_loss": "ignore_index",
           "step_update": "seed offset lr", "step_adamw": "seed offset", "step_lookahead": "alpha capacity", "upgrad": "sweeps ridge",
           "damped": "damping", "ProjectedMomentum": "lr momentum", "ProjectedAdamW": "seed", "decay_noise_step": "seed offset",
           "predict": "batch_size", "membership": "seed batch_size", "by_knn": "k top", "embed": "batch_size",
           "relearn": "seeds steps batch eval_every eval_samples shots lr",
       }.items() for name in names.split()},
    "seeds of relearn": ("seeds", lambda: CALLS["relearn"][0](**{**CALLS["relearn"][1](), "seeds": [0, True]})),
    "positional": ("k", lambda: ops.project_random(r(N, 3), r(N, 2), True, seed=0)),
    "pairs": ("stride", lambda: ops.sqnorm_conv(r(N, 2, 5), r(N, 3, 3), 3, stride=[True])),
    "project_random of a tape": ("k", lambda: tape().project_random(True, seed=0)),
    "seed of a tape": ("seed", lambda: tape().project_random(2, seed=False)),
    "batch_size": ("batch_size", lambda: ef.capture(model, batch_size=True)),
    "batch_dim": ("batch_dim", lambda: ef.capture(model, batch_dim=False)),
    "unlearn, seed": ("seed", lambda: unlearn(seed=True)),
    "unlearn, checkpoint_every": ("checkpoint_every", lambda: unlearn(checkpoint_every=True)),
    "unlearn, eval_every": ("eval_every", lambda: unlearn(eval_every=False)),
    "fit": ("epochs", lambda: fit(net(), r(N, 6), y, epochs=True, lr=0.1, batch_size=2, seed=0)),
    "a class": ("forget", lambda: CALLS["ImageClasses"][0](**{**CALLS["ImageClasses"][1](), "forget": [True]})),
    "bins": ("bins", lambda: calibration_error(torch.eye(C), y[:C], bins=True)),
}  # fmt: skip


def tape():
    with ef.capture(model) as tape:
        tape.backward(model(r(N, 5)).square().sum(1))
    return tape


def unlearn(**how):
    parts = {name: (r(N, 5), y) for name in ("forget", "adjacent", "remote")}
    return ef.unlearn(torch.nn.Linear(5, C), **parts, method=ef.FineTune(epochs=1), progress=False, **how)


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_boolean_is_no_number(name):
    argument, call = BOOLEANS[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*: got .*(True|False|bool).*needs? "):
        call()


def test_nothing_was_changed():
    params, grads = p(), [r(2), [1.0]]
    before = [x.clone() for x in params]
    with pytest.raises(TypeError, match=r"^grads\[1\]: got list"):
        ops.step_update(params, None, grads, [], r(0), lr=0.1)
    assert all(torch.equal(x, b) for x, b in zip(params, before))


class Refusing(torch.nn.Module):
    def forward(self, x):
        raise TypeError("my own error")


def test_an_error_of_the_callers_own_code_comes_through():
    x, y = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError, match="^my own error$"):
        metrics.membership(Refusing(), (x, y), (x, y), seed=1.0)  # 1.0: a wrong kind, but not what failed

    def check(gram):
        raise FloatingPointError("mine")

    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(FloatingPointError, match="^mine$"):
        optim.ProjectedMomentum([p], lr=0.1).step([torch.ones(3)], torch.ones(1, 1, 3), check=check)
