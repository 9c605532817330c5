"""How should singular vectors be read, and how should scores enter the model?

    python run.py NAME... --data DIR        one line each in svd.jsonl or scores.jsonl

Four epochs of the recipe of `small` on four fifths of the training images, evaluated on the other fifth: no test image
is used. `variants` names what was tried. Cost: 1 to 6 minutes a run with one thread.
"""
import json, sys, time
from argparse import ArgumentParser
from pathlib import Path
import torch, torch.nn.functional as F
from fastai.torch_core import set_seed
from torch import nn
from sigma_tokenizer import TopK, create_model
from sigma_tokenizer.checkpoint import train
from sigma_tokenizer.data import image_loaders
from sigma_tokenizer.evaluation import calibrate, evaluate
from sigma_tokenizer.repro.folders import hold_out, load_data
from sigma_tokenizer.score import Scorer
from sigma_tokenizer.svd import kept_triplets, singular_triplets
from sigma_tokenizer.tokens import Tokens
from sigma_tokenizer.training import BFloat16, SparsityLoss, create_learner
from sigma_tokenizer.vit import VisionTransformer

variants = {
    'svd': {
        'linear': dict(read='linear'), 'conv': {},
        'joint': dict(sign='joint'),  # the three channels' signs agree
        'flip': dict(sign='flip'),  # random signs in training
        'wide': dict(widths=(64, 128, 128)), 'deep': dict(widths=(32, 64, 64, 64)),
        'shared': dict(shared=True),  # one stack for u and v
        'input': dict(sigma='input'),  # unit vectors; log sigma beside them
        'mean': dict(mean=True),  # no positions
        'product': dict(product=True),  # mean of u's features times mean of v's
        **{f'rank{n}': dict(rank=n) for n in (4, 16)},  # so many triplets of every image
        **{f'strips{n}': dict(strips=n) for n in (4, 16)}},  # no SVD: means of n strips of columns and of rows
    'scores': {
        'multiply': dict(model='msvd_gated'), 'attention': {}, 'select': dict(effect='select'),
        'both': dict(both=True),  # multiplied, and in the attention
        'first': dict(only=[0]), 'last': dict(only=[3]),  # in the attention of one block
        'sparsity 0': dict(sparsity=0), 'sparsity 0.05': dict(sparsity=.05),
        'gini 0.05': dict(sparsity=.05, kind='gini'),  # unequal scores instead of low ones
        'temperature 0.5': dict(temperature=.5), 'temperature 2': dict(temperature=2.)}}

def stack(widths):
    layers = [[nn.Conv1d(i, o, 5, 2, 2), nn.BatchNorm1d(o), nn.LeakyReLU()] for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*sum(layers, []))

class Reading(nn.Module):
    "SVDTokenizer with one thing changed"
    grid = None
    def __init__(self, side, dim, read='conv', widths=(32, 64, 64), shared=False, sign='one', sigma='scale', mean=False,
                 product=False, rank=None, strips=None):
        super().__init__()
        self.embed_dim, self.n_tokens, self.read, self.sign, self.sigma = dim, rank or side, read, sign, sigma
        self.mean, self.product, self.rank, self.strips = mean, product, rank, strips
        n = 6*side
        if read == 'conv':
            self.u = stack((3, *widths)); self.v = self.u if shared else stack((3, *widths))
            n = 2*widths[-1]*(1 if mean else side//2**len(widths)) + product*widths[-1]
        self.proj = nn.Linear(n + 3*(sigma == 'input'), dim)

    def vectors(self, U, V, S):  # (T, C, M), (T, C, M), (T, C)
        if self.sigma == 'input': U, V = U*U.shape[-1]**.5, V*V.shape[-1]**.5
        else: U, V = U*S[..., None].sqrt(), V*S[..., None].sqrt()
        if self.read == 'linear': f = torch.cat([U, V], -1).flatten(1)
        else:
            u, v = self.u(U), self.v(V)
            f = [h.mean(-1) if self.mean else h.flatten(1) for h in (u, v)]
            f = torch.cat(f + [u.mean(-1)*v.mean(-1)]*self.product, 1)
        return self.proj(torch.cat([f, (S + 1e-3).log()], 1) if self.sigma == 'input' else f)

    def triplets(self, x):
        B, C, M, _ = x.shape
        if n := self.strips:
            return (F.adaptive_avg_pool2d(x, (M, n)), x.new_ones(B, C, n), F.adaptive_avg_pool2d(x, (n, M)).mT,
                    torch.full((B,), n))
        if self.rank: return *(h[..., :self.rank] for h in singular_triplets(x)), torch.full((B,), self.rank)
        return kept_triplets(x, .99)

    def forward(self, x):
        U, S, V, k = self.triplets(x)
        if self.sign == 'joint':
            s = (U*U[:, 1:2]).sum(-2, keepdim=True) + (V*V[:, 1:2]).sum(-2, keepdim=True)
            s = torch.where(s < 0, -1., 1.); U, V = U*s, V*s
        if self.sign == 'flip' and self.training:
            s = (torch.rand(len(x), 1, 1, U.shape[-1]) < .5)*2. - 1; U, V = U*s, V*s
        position = torch.arange(S.shape[-1]).expand(len(x), -1); real = position < k[:, None]
        read = self.vectors(U.movedim(-1, 1)[real], V.movedim(-1, 1)[real], S.mT[real])
        out = read.new_zeros(*real.shape, self.embed_dim); out[real] = read
        energy = S.double().square().sum(1)
        return Tokens(out, real, (energy/energy.sum(1, keepdim=True)).float()*real, position)

class Scores(Scorer):
    temperature, both = 1., False
    def forward(self, t):
        s = (self.mlp(t.x)[..., 0].float()/self.temperature).sigmoid().masked_fill(~t.mask, 0)
        if self.effect == 'multiply' or self.both: return t.replace(x=t.x*s[..., None].to(t.x.dtype), scores=s)
        if self.effect == 'select' and self.training:
            return t.replace(x=t.x*(1 + s - s.detach())[..., None].to(t.x.dtype), scores=s)
        return t.replace(scores=s)

def make(kind, model='msvd_weighted', effect=None, both=False, temperature=1., only=None, **kw):
    if kind == 'svd': return VisionTransformer(Reading(64, 128, **kw), 6, 4, 4, drop_rate=0.)
    m = create_model(model, image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, drop_rate=0.)
    m.scorer.__class__, m.scorer.temperature, m.scorer.both = Scores, temperature, both
    if effect: m.scorer.effect = effect
    if only is not None:
        run, chosen = m.run_block, [m.blocks[i] for i in only]
        def run_block(block, x, mask, cls_only=False):
            if any(block is c for c in chosen): return run(block, x, mask, cls_only)
            return run(block, x, torch.where(mask > -torch.inf, 0., -torch.inf), cls_only)
        m.run_block = run_block
    return m

def main(kind, name, data, epochs, seed):
    options = dict(variants[kind][name])
    data = hold_out(load_data(data, 64), .2); set_seed(seed, reproducible=True)
    dls = image_loaders(data, 64); loss = options.pop('sparsity', .0125), options.pop('kind', 'mean')
    m = make(kind, **options)
    cbs = [*[SparsityLoss(*loss)]*bool(loss[0]), BFloat16()] if kind == 'scores' else []
    log = train(create_learner(m, dls, .01, cbs, decay_all=True), epochs, 1e-3, 'one_cycle')
    budgets = [None, *map(TopK, (1, 4, 8, 16, 32) if kind == 'svd' else (1, 4, 8, 16, 24, 32, 48))]
    found, scores = evaluate(m, dls.valid, budgets)
    right = (found['preds'] == found['labels']).mean(1)
    r = dict(name=name, epochs=epochs, seed=seed, seconds=round(sum(e['seconds'] for e in log)),
             length=round(float(found['lengths'][0].mean()) - 1, 2),
             accuracy={'all' if k is None else k.k: round(float(a), 4) for k, a in zip(budgets, right)})
    if kind == 'scores':
        p = calibrate(m, dls, 17); by_p, _ = evaluate(m, dls.valid, [p])
        r |= dict(mean_score=round(float(scores.mean()), 3), std_within=round(float(scores.std(1).mean()), 3),
                  top_p_of_16=dict(accuracy=round(float((by_p['preds'] == by_p['labels']).mean()), 4),
                                   length=round(float(by_p['lengths'].mean()) - 1, 2),
                                   std_of_length=round(float(by_p['lengths'].std()), 2)))
    with open(Path(__file__).with_name(f'{kind}.jsonl'), 'a') as f: f.write(json.dumps(r) + '\n')
    print(r, flush=True)

if __name__ == '__main__':
    parser = ArgumentParser(); parser.add_argument('names', nargs='+'); parser.add_argument('--data', required=True)
    parser.add_argument('--epochs', type=int, default=4); parser.add_argument('--seed', type=int, default=239)
    args = parser.parse_args(); torch.set_num_threads(1)
    for name in args.names:
        main(next(kind for kind, v in variants.items() if name in v), name, args.data, args.epochs, args.seed)
