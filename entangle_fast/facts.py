"""What the numbers mean that a method reports of its run as a whole, and what good ones look like."""

from __future__ import annotations

# key, or how it begins, of a report's flattened facts; the first that fits
MEANINGS = {
    # Entangled: methods/propositions.py
    "first_order applies": "is there a small step that helps adjacent and, to first order, leaves forget and remote alone? good: True",
    "first_order why": "why there is none",
    "first_order step": "learning rate of that step, tried on one batch at the end of the run (Proposition 4.1)",
    "first_order predicted_adjacent": "what the step should change in the adjacent loss",
    "first_order change_adjacent": "what it did change; good: close to predicted_adjacent",
    "first_order order_adjacent": "good: near 1, the change grows with the step",
    "first_order change_forget": "what it changed in the forget objective; good: far smaller than change_adjacent",
    "first_order change_remote": "what it changed in the remote loss; good: far smaller than change_adjacent",
    "first_order order_": "good: near 2, the change grows only with the step's square; None: too small to tell; at kinks (ReLU) any",
    "forget_bound classes": "n: a guess among n classes has loss log n (Proposition 4.2, on the forget training samples)",
    "forget_bound epsilon": "how far the forget objective has moved since stage 1; good: small, the bound is then tight",
    "forget_bound log_n": "what each forget loss must exceed after stage 1 for the proposition to apply",
    "forget_bound m min": "smallest forget loss after stage 1; good: above log_n",
    "forget_bound m": "the same, the lowest 1 (5, 25, 50) % of the losses left out",
    "forget_bound bound min": "most the forget accuracy can be, as a share; good: far below 1; above 1 or None it says nothing",
    "forget_bound bound": "the same for the samples that m then speaks of",
    "forget_bound holds_for_all_samples": "good: True, m min exceeds log_n",
    # Pgu
    "protected": "[rank, dimension] of the retained inputs this layer keeps its answers to; good: rank well below dimension",
}


def meaning(key: str) -> str:
    """A line on the fact of this flattened name; "" for one that is not known."""
    return next((text for start, text in MEANINGS.items() if key.startswith(start)), "")
