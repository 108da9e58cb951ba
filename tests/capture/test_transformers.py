"""Hugging Face's own models, tiny and untrained (no download); skipped where transformers is not installed."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree
from zoo import lively

transformers = pytest.importorskip("transformers")
VOCAB = 17


def causal(name, **config):
    tiny = dict(vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    made = getattr(transformers, name + "Config")(**{**tiny, **config})
    return getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(made)


def token_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


def language(model, t=5, **extra):
    return Case(lively(model), lambda n: {"input_ids": torch.randint(1, VOCAB, (n, t)), **extra},
                lambda net, b: token_loss(net(**b).logits, b["input_ids"]))  # fmt: skip


def masked(case):
    """With a padding mask per sample."""
    draw = case.batch

    def batch(n):
        b = draw(n)
        lengths = torch.arange(n) % 3 + 3
        return {**b, "attention_mask": (torch.arange(b["input_ids"].shape[1])[None] < lengths[:, None]).long()}

    case.batch = batch
    return case


GPT2 = dict(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=VOCAB)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def t5():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    return Case(lively(model), lambda n: {"input_ids": torch.randint(1, VOCAB, (n, 5)), "labels": torch.randint(1, VOCAB, (n, 4))},
                lambda net, b: F.cross_entropy(net(**b).logits.mT, b["labels"], reduction="none").mean(1))  # fmt: skip


def bert(t=5):
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                                     max_position_embeddings=16)  # fmt: skip
    return Case(lively(transformers.BertForSequenceClassification(config)),
                lambda n: {"input_ids": torch.randint(1, VOCAB, (n, t)), "y": torch.randint(0, 2, (n,))},
                lambda net, b: F.cross_entropy(net(input_ids=b["input_ids"]).logits, b["y"], reduction="none"))  # fmt: skip


def vit():
    config = transformers.ViTConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                                    patch_size=4, num_labels=3)  # fmt: skip
    return Case(lively(transformers.ViTForImageClassification(config)),
                lambda n: {"x": torch.randn(n, 3, 8, 8).double(), "y": torch.randint(0, 3, (n,))},
                lambda net, b: F.cross_entropy(net(pixel_values=b["x"]).logits, b["y"], reduction="none"))  # fmt: skip


def gpt2_classifier():
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2, pad_token_id=0))
    return Case(lively(model), lambda n: {"input_ids": torch.randint(1, VOCAB, (n, 5)), "y": torch.randint(0, 2, (n,))},
                lambda net, b: F.cross_entropy(net(input_ids=b["input_ids"]).logits, b["y"], reduction="none"))  # fmt: skip


CASES = {
    "gpt2": lambda: language(gpt2()),
    "gpt2_masked": lambda: masked(language(gpt2())),
    "gpt2_as_many_positions_as_samples": lambda: language(gpt2(), t=4),
    "gpt2_no_cache": lambda: language(gpt2(), use_cache=False),
    "gpt2_classifier": gpt2_classifier,
    "llama": lambda: language(causal("Llama", num_key_value_heads=1)),
    "llama_masked_tied": lambda: masked(language(causal("Llama", tie_word_embeddings=True))),
    "llama_as_many_positions_as_samples": lambda: language(causal("Llama"), t=4),
    "qwen2": lambda: language(causal("Qwen2", num_key_value_heads=1)),
    "gemma": lambda: language(causal("Gemma", head_dim=4, num_key_value_heads=1)),
    "gptneox": lambda: language(causal("GPTNeoX")),
    "bert": bert,
    "bert_as_many_positions_as_samples": lambda: bert(4),
    "vit": vit,
    "t5": t5,
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_autograd(name):
    torch.manual_seed(2)
    agree(CASES[name](), rtol=1e-5 if name == "gemma" else 1e-10)  # Gemma's norm computes in float32
