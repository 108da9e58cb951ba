import pytest
import torch
import torch.nn.functional as F
from stepping import begin, follow, gradient, resumes_to_the_bit, retain_batch, trainable

from entangle_fast.methods.baselines import FineTune, L1Sparse

F64 = torch.float64


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_it_descends_on_the_retain_loss_and_the_l1_norm(max_norm):
    def direction(model, d, k):
        x, y = retain_batch(d, k, 17)
        penalty = 0.05 * (1 - k / 8) * sum(p.abs().sum() for p in trainable(model))
        return gradient(F.cross_entropy(model(x), y) + penalty, model)

    process = follow(L1Sparse(batch=17, epochs=2, gamma=0.05, max_norm=max_norm), direction, steps=8)
    assert process.total == 8 and process.stages == [("l1_sparse", 8)]


def test_it_makes_weights_small_that_finetuning_leaves():
    norms = []
    for config in (L1Sparse(batch=17, epochs=10, gamma=0.1), FineTune(batch=17, epochs=10)):
        process = begin(config, torch.float32)
        while process.done < process.total:
            process.step()
        norms.append(sum(float(p.detach().abs().sum()) for p in trainable(process.model)))
    assert norms[0] < 0.8 * norms[1]


def test_resume(tmp_path):
    resumes_to_the_bit(L1Sparse(batch=17, epochs=2), tmp_path)


@pytest.mark.parametrize("change", [{"gamma": 0.0}, {"gamma": float("nan")}, {"lr": -1.0}, {"epochs": 0}])
def test_refusals(change):
    with pytest.raises(ValueError, match=f"{[*change][0]}: got .*; needs a finite number > 0"):
        L1Sparse(**change)
