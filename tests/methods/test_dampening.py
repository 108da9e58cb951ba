import pytest
import torch
import torch.nn.functional as F
from small import data, flat
from stepping import begin, each_gradient, resumes_to_the_bit, trained

from entangle_fast.methods import METHODS
from entangle_fast.methods.dampening import Ssd
from entangle_fast.methods.process import NonFinite


@pytest.mark.parametrize("against", ["all", "retain"])
@pytest.mark.parametrize("alpha, lam, batch", [(1.5, 1.0, 7), (1.0, 0.2, 256), (1.2, 2.0, 16)])
def test_it_dampens_what_the_paper_says(against, alpha, lam, batch):
    process, other = begin(Ssd(alpha=alpha, lam=lam, against=against, batch=batch)), trained(torch.float64)
    rows = []
    while process.done < process.total:
        rows.append(process.step())
    squares = {n: each_gradient(other, *getattr(process.data, n).tensors).square() for n in ("forget", "adjacent", "remote")}
    z_f = squares["forget"].mean(0)
    z_d = torch.cat([squares[n] for n in squares if against == "all" or n != "forget"]).mean(0)
    theta = flat(other)
    expected = torch.where(z_f > alpha * z_d, (lam * z_d / z_f).clamp(max=1) * theta, theta)
    torch.testing.assert_close(flat(process.model), expected, rtol=1e-10, atol=1e-12)
    share = (z_f > alpha * z_d).double().mean().item()
    assert rows[-1]["dampened"] == pytest.approx(share) and 0.02 < share < 0.98
    assert [r["stage"] for r in rows] == ["importance"] * (len(rows) - 1) + ["dampen"]


def test_a_large_alpha_changes_nothing():
    process = begin(Ssd(alpha=1e9))
    before = flat(process.model).clone()
    while process.done < process.total:
        process.step()
    assert torch.equal(flat(process.model), before)


def test_resume(tmp_path):
    resumes_to_the_bit(Ssd(batch=16, alpha=1.0), tmp_path, steps=8, cut=4)  # 2 + 2 + 3 batches, and the dampening
    assert METHODS["ssd"] is Ssd


def test_augmentation_does_not_reach_the_importances():
    sets = data()
    sets.forget.augment = sets.remote.augment = lambda x, generator: x * torch.nan
    process = begin(Ssd(), torch.float32, sets=sets)
    while process.done < process.total:
        process.step()
    assert torch.isfinite(flat(process.model)).all()


def test_a_gradient_that_is_not_finite_is_refused():
    process = begin(Ssd(), torch.float32)
    before = flat(process.model).clone()
    process.loss = lambda out, y: 1e25 * F.cross_entropy(out, y, reduction="none")  # finite, and so are its gradients
    with pytest.raises(NonFinite, match="squared gradient on the forget set"):
        while process.done < process.total:
            process.step()
    assert torch.equal(flat(process.model), before)


@pytest.mark.parametrize("change, message", [
    (dict(alpha=0.0), "alpha: got 0.0"), (dict(lam=-1.0), "lam: got"), (dict(batch=0), "batch: got 0; needs a whole number"),
    (dict(against="forget"), "against: got 'forget'; needs 'all' or 'retain'"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Ssd(**change)
