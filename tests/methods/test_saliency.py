import pytest
import torch
import torch.nn.functional as F
from small import flat
from stepping import begin, follow, gradient, resumes_to_the_bit, retain_batch, trained

from entangle_fast.methods import METHODS
from entangle_fast.methods.process import NonFinite
from entangle_fast.methods.saliency import SalUn, saliency

SIZES = dict(batch=8, retain_batch=17)


@pytest.mark.parametrize("keep, max_norm", [(0.5, 0.05), (0.1, 0.0), (1.0, 1.0)])
def test_it_takes_masked_steps_on_random_labels(keep, max_norm):
    start = trained(torch.float64)
    shift = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0))
    mask = []

    def direction(model, d, k):
        x, y = d.forget.tensors
        if not mask:
            sizes = gradient(F.cross_entropy(start(x), y), start).abs()
            mask.append(sizes >= sizes.sort(descending=True).values[-(-int(keep * 1000) * len(sizes) // 1000) - 1])
        rows = d.forget.rows(k, 8)
        forget = F.cross_entropy(model(x[rows]), ((y + shift) % 4)[rows])
        rx, ry = retain_batch(d, k, 17)
        return mask[0] * gradient(F.cross_entropy(model(rx), ry) + forget, model)

    process = follow(SalUn(**SIZES, keep=keep, max_norm=max_norm), direction)
    moved = flat(process.model) != flat(start)
    assert torch.equal(moved, mask[0]) and moved.double().mean().item() == pytest.approx(keep, abs=0.01)


def test_half_of_the_parameters_are_salient_by_default_over_all_tensors():
    found = saliency([torch.tensor([[4.0, -3.0]]), torch.tensor([1.0, -2.0])], 0.5)
    assert [m.tolist() for m in found] == [[[True, True]], [False, False]]
    # an odd count rounds up; ties with the last are in; zeros are out
    assert torch.cat(saliency([torch.tensor([1.0, 2.0, -3.0])], 0.5)).tolist() == [False, True, True]
    assert torch.cat(saliency([torch.tensor([1.0, -1.0, 1.0, 0.0])], 0.5)).tolist() == [True, True, True, False]
    assert torch.cat(saliency([torch.tensor([0.0, 0.0, 0.0, 5.0])], 0.5)).tolist() == [False, False, False, True]


def test_no_mask_is_made_of_what_is_not_finite():
    process = begin(SalUn(**SIZES))
    process.loss = lambda output, y: F.cross_entropy(output, y, reduction="none") * torch.nan
    with pytest.raises(NonFinite, match="non-finite loss on the forget set"):
        process.enter("salun")
    assert not process.mask


def test_resume(tmp_path):
    whole, second = resumes_to_the_bit(SalUn(**SIZES), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.mask, second.mask)) and METHODS["salun"] is SalUn


def test_it_stops_once_the_forget_set_is_forgotten():
    process = begin(SalUn(batch=10, lr=0.2, epochs=100, stop_at=0.1), torch.float32)
    while process.done < process.total and not process.stopped:
        process.step()
    assert process.stopped and process.done < process.total


@pytest.mark.parametrize("change, message", [
    (dict(keep=0.0), r"keep: got 0.0; needs a share"), (dict(keep=1.1), "keep: got 1.1"), (dict(keep=float("nan")), "keep: got nan"),
    (dict(lr=0.0), "lr: got"), (dict(retain_batch=0), "retain_batch: got"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        SalUn(**change)
