"""Milliseconds from pixels to logits, in turns on one core: python time.py --data DIR > time.csv"""
from argparse import ArgumentParser
from statistics import median
import torch
from sigma_tokenizer import TopK, TopP, create_model
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.repro.folders import load_data
from sigma_tokenizer.tokens import imagenet_normalize

def rows(data, size, batch, budgets, rounds, models):
    x = torch.from_numpy(load_data(data, size['image_size']).test.images[::3000//batch][:batch].copy())
    x, calls = x.permute(0, 3, 1, 2).float()/255, {}
    for name, kw in models.items():
        m = create_model(**size | kw).eval()
        for k in budgets if kw.get('reduction') else (None,):
            calls[name, k] = lambda m=m, k=k: m(imagenet_normalize(x) if m.normalize else x, k)
    for call in calls.values(): call()
    for (name, k), ms in in_turns(calls, rounds).items():
        print(f'{size["image_size"]},{batch},{name},{k or "all"},{median(ms):.2f}', flush=True)

parser = ArgumentParser(); parser.add_argument('--data', required=True); data = parser.parse_args().data
torch.set_num_threads(1); torch.set_grad_enabled(False)
print('image_size,batch,model,budget,ms')
scored = {n: dict(name=n, reduction='rest') for n in ('msvd_gated', 'msvd_weighted')}
svd = {f'svd {read} {p}': dict(name='svd', energy=p, read=read) for p in (.9, .99) for read in ('linear', 'conv')}
for side, batch, rounds in ((64, 64, 9), (128, 32, 5)):
    size = dict(image_size=side, patch_size=8, embed_dim=128, depth=4, num_heads=4)
    others = dict(vit=dict(name='vit'), fft=dict(name='fft', filter_size=side//2))
    rows(data, size, batch, (None, TopK(16), TopK(4), TopP(.5)), rounds, scored | others | svd)
rows(data, dict(image_size=256, patch_size=16), 2, (None, TopK(64), TopK(16)), 3, scored)
