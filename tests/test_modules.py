"The encoder calls its modules and reads no weights, so whatever hooks a call works: LoRA, pruning, quantisation"
import warnings
from collections import Counter
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from sigma_tokenizer import TopK, TopP, create_model, list_models
from torchinfo import summary
from conftest import batch, gap, label, make, model, small, some_budgets, variants

x = batch([('crop', 0), ('noise', 1), ('crop', 3)])
def linears(m): return {n: p for n, p in m.named_modules() if isinstance(p, nn.Linear)}

@pytest.mark.parametrize('variant', variants, ids=label)
def test_every_module_is_called(variant):
    m = make(variant[0], **variant[1]).eval()
    for keep in (None,) if m.scorer is None else (None, TopK(1), TopP(.2)):
        fired, hooks = Counter(), []
        for n, part in m.named_modules():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                hooks.append(part.register_forward_hook(lambda *_, n=n: fired.update([n]))); fired[n] = 0
        m(x, keep=keep)
        for h in hooks: h.remove()
        for n, times in fired.items():
            if n.startswith('reduction'): assert times == (keep is not None), (n, times)
            elif n in linears(m): assert times == 1, (n, times)
            else: assert times >= 1, n

@pytest.mark.parametrize('i', range(len(variants)), ids=map(label, variants))
def test_torchinfo(i):
    "It hooks all modules too, and reads what they take and give"
    for keep in some_budgets(model(i)):
        table = summary(model(i), input_data=x, keep=keep, verbose=0)
        total = sum(p.numel() for p in model(i).parameters())  # glimpse calls a part outside of its parent: counted twice
        assert table.total_mult_adds > 0 and (table.total_params == total or label(variants[i]).startswith('glimpse'))

@pytest.mark.parametrize('variant', variants[:len(list_models()) + 1], ids=label)
def test_lora(variant):
    peft = pytest.importorskip('peft'); torch.manual_seed(0)
    m = create_model(variant[0], **small | variant[1], drop_rate=0.)
    keep = TopK(4) if m.scorer is not None else None; plain = m.eval()(x, keep=keep)
    names = list(linears(m)); config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    tuned = peft.get_peft_model(m, config); logits = tuned(x, keep=keep)
    F.cross_entropy(logits, torch.arange(3)).backward()
    adapters = {n: p for n, p in tuned.named_parameters() if 'lora_' in n}
    assert len(adapters) == 2*len(names)
    assert not [n for n, p in adapters.items() if p.grad is None or not p.grad.any()]
    assert gap(logits, plain) > .01 and gap(tuned.merge_and_unload()(x, keep=keep), logits) < 1e-5

@pytest.mark.parametrize('name', list_models())
@torch.no_grad()
def test_pruning(name):
    m = create_model(name, **small).eval(); want = m(x)
    for part in linears(m).values():
        prune.l1_unstructured(part, 'weight', .5)
        pruned = m(x); assert gap(pruned, want) > 1e-5
        prune.remove(part, 'weight')
        assert gap(m(x), pruned) < 1e-6 and isinstance(part._parameters['weight'], nn.Parameter); want = pruned

@pytest.mark.parametrize('name', list_models())
def test_dynamic_quantisation(name):
    try: from torch.ao.quantization import quantize_dynamic
    except ImportError: pytest.skip('not in this version of torch')
    m = model(list_models().index(name))
    with warnings.catch_warnings(action='ignore'): small_m = quantize_dynamic(m, {nn.Linear}, torch.qint8)
    assert not linears(small_m) and 0 < gap(small_m(x), m(x)) < .2
